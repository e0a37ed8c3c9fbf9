"""Surgery on a loaded model: wrap, merge, unwrap, adapters by name, ensembles."""

"""Surgery on a loaded model: wrap, merge, unwrap, named adapters, and ensembles."""

"""The names by which data sets call the roles of a chat.

| role | other names, in any case |
|---|---|
| user | human, prompter |
| assistant | gpt, model, bot, chatgpt, ai, bing, bard |
| system | developer |
| tool | function, observation, ipython, tool_response, function_response, tool_result |
| assistant with `tool_calls` | function_call, tool_call |

Other names reach the chat template unchanged.
"""

from __future__ import annotations

NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "ai", "bing", "bard"),
    "system": ("system", "developer"),
    "tool": (
        "tool",
        "function",
        "observation",
        "ipython",
        "tool_response",
        "function_response",
        "tool_result",
    ),
}
# An assistant's turn whose content is the JSON text of its calls.
CALLS = ("function_call", "tool_call")
ROLES = {name: role for role, names in NAMES.items() for name in names}


def known_role(name: str) -> str | None:
    """The template's name of a role, `function_call` for a turn of calls, None if unknown."""
    folded = name.strip().casefold()
    return "function_call" if folded in CALLS else ROLES.get(folded)

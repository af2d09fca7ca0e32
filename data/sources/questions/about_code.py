"""Questions about a function of the standard library."""

import random
import re

from data.sources.questions.kinds import ABOUT_CODE, Ask, Kind, worded
from data.sources.questions.material import Function

PROGRAMMING_LANGUAGES = ("JavaScript", "TypeScript", "Java", "Go", "Rust", "C++", "Ruby")
MISTAKES = (
    (r" == ", " = "),
    (r":\n", "\n"),
    (r" not in ", " in "),
    (r"\breturn ", "retrun "),
    (r" is None", " is not None"),
    (r"\bself\.", ""),
    (r"\)\n", "\n"),
    (r" < ", " > "),
    (r"\belif ", "else if "),
    (r" \+ ", " - "),
)
"""Patterns of code, each with what a careless programmer may write instead."""


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _about(*forms: str, longest: int = 1_600, **choices: tuple[str, ...]) -> Ask:
    """Returns an `ask` that fills {code} and {name}."""
    fill = worded(*forms, **choices)

    def ask(function: Function, rng: random.Random) -> str | None:
        if len(function.code) > longest:
            return None
        return fill(rng, code=_fenced(function.code), name=function.name)

    return ask


def _write(function: Function, rng: random.Random) -> str | None:
    if not function.summary or function.name.startswith("__"):
        return None
    task = function.summary.rstrip(".")
    arguments = ", ".join(f"`{name}`" for name in function.arguments)
    takes = f" It takes {arguments}." if arguments and rng.random() < 0.6 else ""
    return rng.choice(
        (
            f"Write a Python function `{function.name}` for this: {task}.{takes}",
            f"I need a function in Python that does the following: {task[0].lower()}{task[1:]}.{takes} Keep it short.",
            f"Implement this function:\n\n{_fenced(function.header)}\n\nWhat it should do: {task}.",
            f"Please write `{function.header}` with a docstring. Description: {task}.",
        )
    )


def _from_docstring(function: Function, rng: random.Random) -> str | None:
    if len(function.docstring) < 120:
        return None
    start = rng.choice(
        ("Write the function that this docstring describes.", "Here is a docstring. Write its function.")
    )
    return f'{start}\n\n```python\n{function.header}\n    """{function.docstring}"""\n```'


def _raises(function: Function, rng: random.Random) -> str | None:
    if not function.raised:
        return None
    which = rng.choice(function.raised)
    asked = rng.choice(
        (
            "Which exceptions does this function raise, and when?",
            f"When does `{function.name}` raise {which}?",
            f"What does this raise? Give me a call that makes it raise {which}.",
            "List every error that this code can raise, with its cause.",
        )
    )
    return f"{asked}\n\n{_fenced(function.code)}"


def _complete(function: Function, rng: random.Random) -> str | None:
    lines = function.code.split("\n")
    if len(lines) < 8:
        return None
    kept = "\n".join(lines[: len(lines) * rng.choice((4, 5, 6)) // 10])
    asked = rng.choice(("Complete this function.", "Finish this code:", "The rest of this function is lost. Write it."))
    about = f" It should do this: {function.summary}" if function.summary else ""
    return f"{asked}{about}\n\n{_fenced(kept)}"


def _fix(function: Function, rng: random.Random) -> str | None:
    if len(function.code) > 900:
        return None
    found = [(pattern, wrong) for pattern, wrong in MISTAKES if re.search(pattern, function.code)]
    if not found:
        return None
    pattern, wrong = rng.choice(found)
    places = list(re.finditer(pattern, function.code))
    place = rng.choice(places)
    broken = function.code[: place.start()] + wrong + function.code[place.end() :]
    asked = rng.choice(
        (
            "There is a mistake in this function. Find it and correct it.",
            "This code does not work. What is wrong?",
            "Fix the bug:",
            "Please correct this Python code and say what you changed.",
        )
    )
    return f"{asked}\n\n{_fenced(broken)}"


def _name(function: Function, rng: random.Random) -> str | None:
    if len(function.code) > 900 or function.name.startswith("__"):
        return None
    unnamed = re.sub(rf"\b{re.escape(function.name)}\b", "f", function.code)
    asked = rng.choice(
        (
            "Suggest a good name for the function `f`.",
            "What would you call this function? Give three names and say which is the best.",
            "The name `f` says nothing. Find a better one, and better names for its arguments.",
        )
    )
    return f"{asked}\n\n{_fenced(unnamed)}"


def _calls(function: Function, rng: random.Random) -> str | None:
    if len(function.calls) < 3 or len(function.code) > 1_200:
        return None
    asked = rng.choice(
        (
            "List the functions that this code calls.",
            f"What is `{rng.choice(function.calls)}` used for in this function?",
            "Extract the names of all variables that are assigned in this function.",
            "Which other functions does it depend on? Answer with a list.",
        )
    )
    return f"{asked}\n\n{_fenced(function.code)}"


def _arguments(function: Function, rng: random.Random) -> str | None:
    if len(function.arguments) < 2:
        return None
    argument = rng.choice(function.arguments)
    asked = rng.choice(
        (
            f"What is the argument `{argument}` for?",
            "Describe each argument in one line.",
            "Make a table of the arguments of this function: name, type, meaning.",
            f"What happens if `{argument}` is None?",
        )
    )
    return f"{asked}\n\n{_fenced(function.code)}"


def _translate_docstring(function: Function, rng: random.Random) -> str | None:
    if not 60 <= len(function.docstring) <= 900:
        return None
    language = rng.choice(("French", "German", "Spanish", "Italian", "Portuguese"))
    asked = rng.choice((f"Translate this docstring to {language}.", f"How would you say this in {language}?"))
    return f"{asked}\n\n{function.docstring}"


KINDS = tuple(
    Kind(name=name, pieces="functions", ask=ask, follow_ups=ABOUT_CODE)
    for name, ask in {
        "explain code": _about(
            "Explain this function.\n\n{code}",
            "What does this function do?\n\n{code}",
            "Go through this code step by step.\n\n{code}",
            "{code}\n\nExplain what `{name}` returns.",
            "I found this in a library. Can you explain it in plain words?\n\n{code}",
        ),
        "write function": _write,
        "write from docstring": _from_docstring,
        "exceptions": _raises,
        "complete code": _complete,
        "fix code": _fix,
        "name": _name,
        "list calls": _calls,
        "arguments": _arguments,
        "translate docstring": _translate_docstring,
        "write docstring": _about(
            "Write a docstring for this function.\n\n{code}",
            "Document this code in the style of {style}.\n\n{code}",
            "Add a docstring to `{name}` that says what it takes and returns.\n\n{code}",
            longest=1_000,
            style=("Google", "NumPy", "Sphinx"),
        ),
        "write tests": _about(
            "Write tests for this function with {tool}.\n\n{code}",
            "Which tests does `{name}` need? Write {number} of them.\n\n{code}",
            longest=900,
            tool=("pytest", "unittest", "doctest"),
            number=("two", "three", "four"),
        ),
        "rewrite code": _about(
            "Rewrite this function {how}.\n\n{code}",
            "{code}\n\nCan you rewrite `{name}` {how}?",
            longest=900,
            how=(
                "so that it is shorter",
                "with type hints",
                "with better names",
                "without nested conditions",
                "so that it prints what it does",
                "as a class",
                "in a more modern style",
            ),
        ),
        "translate code": _about(
            "Translate this function to {language}.\n\n{code}",
            "How would `{name}` look in {language}?\n\n{code}",
            longest=900,
            language=PROGRAMMING_LANGUAGES,
        ),
        "review code": _about(
            "Review this code.\n\n{code}",
            "What could be improved in `{name}`?\n\n{code}",
            "How fast is this function for large inputs?\n\n{code}",
            "Is this code safe to run with input from strangers?\n\n{code}",
            "Does this function have side effects? Which?\n\n{code}",
        ),
        "commit message": _about(
            "I have just added this function. Write the commit message.\n\n{code}",
            "Write a line for the change log about this new function.\n\n{code}",
            longest=900,
        ),
    }.items()
)

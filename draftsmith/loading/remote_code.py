"""Code in a model's folder: it is not run unless the user allows it, by `--trust-remote-code` or `allow()`."""

_is_allowed = False


def allow() -> None:
    """Lets transformers run the code of the models that this process loads from now on."""
    global _is_allowed
    _is_allowed = True


def is_allowed() -> bool:
    """Returns whether models may run their own code: the `trust_remote_code` that every loading function is given.

    Without that argument transformers asks on standard input.
    """
    return _is_allowed


def reason(error: Exception) -> str:
    """Returns why a model cannot be loaded, in one line, and how to allow its code if that is needed."""
    if "trust_remote_code" in str(error):
        return "its folder has Python code that must run; read that code, and pass --trust-remote-code if you trust it"
    first, *rest = str(error).splitlines() or [type(error).__name__]
    return " ".join(str(error).split()) if rest and first.endswith(":") else first

"""Names of classes: what may be one, and lists of them."""
from pegasus.cli import UserError

PAIR = "horse,bird"  # by default
TAKEN = {  # names of modes, and of parts that data come in
    "any", "morph", "pegasus", "prior", "walk", "train", "test", "val", "valid", "validation"
}


def is_name(name: object) -> bool:
    """Return whether a class may have a name: it stands in lists, options and captions."""
    if not isinstance(name, str) or not name.isprintable() or name.strip() != name:
        return False
    coat = name.startswith(("white ", "dark "))
    return bool(name) and "," not in name and name not in TAKEN and not coat


def parse(names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in a comma-separated list. Raises UserError unless all are known."""
    given = tuple(name.strip() for name in names.split(",") if name.strip())
    repeated = len(set(given)) < len(given)
    if set(given) - set(known) or repeated or not given:
        raise UserError(
            f"--classes: got {names!r}, wanted one or more different ones of "
            f"{', '.join(known)}, separated by commas"
        )
    return given

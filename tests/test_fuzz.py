"""hypothesis's inputs for the functions that `make fuzz` runs atheris on."""
import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = fuzz.seeds()


def replaced(seed: bytes, at: int, length: int, new: bytes) -> bytes:
    """Return a good input with a part of it replaced."""
    at %= len(seed)
    return seed[:at] + new + seed[at + length :]


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Return any bytes, or a good input with some of them in place of a part of it."""
    changed = st.builds(
        replaced,
        st.sampled_from(SEEDS[name]),
        st.integers(0, 9999),
        st.integers(0, 20),
        st.binary(max_size=9),
    )
    return st.binary(max_size=300) | changed


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_bytes_are_read_or_refused_in_a_sentence(name):
    @settings(deadline=None, max_examples=150, derandomize=True, database=None)
    @given(inputs(name))
    def run(data: bytes) -> None:
        fuzz.TARGETS[name](data)

    run()


READERS = {
    "batch": (fuzz.cifar10, "read"),
    "checkpoint": (fuzz.checkpoint, "load"),
    "pickle": (fuzz.checkpoint, "load"),
    "command": (fuzz.cli, "parse"),
}


@pytest.mark.parametrize("name", READERS)
def test_good_inputs_are_read(monkeypatch, name):
    """Else the above would look at nothing but refusals."""
    module, reader = READERS[name]
    read = getattr(module, reader)
    results = []

    def watched(*args: object) -> object:
        result = read(*args)
        results.append(result)
        return result

    monkeypatch.setattr(module, reader, watched)
    for seed in SEEDS[name]:
        fuzz.TARGETS[name](seed)
    assert results

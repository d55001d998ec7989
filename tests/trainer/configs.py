"""Random settings for property tests."""

import dataclasses
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from trainer.settings.tree import RunConfig


def configs(cls: type = RunConfig) -> st.SearchStrategy[Any]:
    """Any config whose fields have the right types; most break some rule."""
    return st.builds(cls, **{name: _values(hint) for name, hint in get_type_hints(cls).items()})


def _values(hint: Any) -> st.SearchStrategy[Any]:
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return configs(hint)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is tuple:
        return st.tuples(*(_values(item) for item in get_args(hint)))
    return {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(),
    }[hint]

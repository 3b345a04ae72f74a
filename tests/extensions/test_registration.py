"""Registrations that cannot serve are refused, each with what to write instead."""

from __future__ import annotations

import pytest

from examples.extensions import solver as solver_example
from examples.extensions.communicator import CountedCommunicator
from examples.extensions.engine import OneAllReduce
from kfac_dist.extensions import Engine, ExtensionError, register_communicator, register_engine, register_solver
from tests.extensions.parts import OwnLayer


class Silent(Engine):
    """Lacks methods."""


REGISTRATIONS = {
    "register_solver": (
        register_solver,
        solver_example.conjugate_gradients,
        "expected a function of (matrices, previous)",
    ),
    "register_communicator": (register_communicator, CountedCommunicator.create, "expected a function of (group, "),
    "register_engine": (register_engine, OneAllReduce, "expected a class that derives from Engine"),
}
SHIPPED = {"register_solver": "cholesky", "register_communicator": "mpi", "register_engine": "ddp"}
OWN = {
    "register_solver": "conjugate_gradients",
    "register_communicator": "counted",
    "register_engine": "one_all_reduce",
}


@pytest.mark.parametrize("function", REGISTRATIONS)
def test_what_cannot_serve_is_refused(function: str) -> None:
    register, good, expected = REGISTRATIONS[function]
    for name, thing, version, said in [
        (SHIPPED[function], good, 1, f"the name {SHIPPED[function]!r} is taken, as are "),
        (OWN[function], good, 1, f"the name {OWN[function]!r} is taken, as are "),
        ("Own", good, 1, "found the name 'Own'; expected lower-case letters, digits and '_'"),
        ("own", good, 2, "found api_version=2, this kfac_dist has 1"),
        ("own", 5, 1, expected),
        ("own", lambda: None, 1, "too many positional arguments"),
    ]:
        with pytest.raises(ExtensionError) as error:
            register(name, thing, api_version=version)
        assert str(error.value).startswith(f"{function}: ")
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_an_engine_without_methods_is_refused() -> None:
    with pytest.raises(ExtensionError, match="Silent lacks methods: write communicator, gradients, layout, parameters"):
        register_engine("silent", Silent, api_version=1)
    with pytest.raises(ExtensionError, match="OwnLayer must derive from kfac_dist"):
        register_engine("silent", OwnLayer, api_version=1)  # type: ignore[arg-type]

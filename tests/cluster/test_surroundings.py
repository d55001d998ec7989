"""Claims about a rank's environment and about joining its group, with real ranks in the processes of joining.py."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.failures import RankError
from cluster.surroundings import GLOO, NCCL, NoSuchInterface, check_interface, drop_foreign
from tests.cluster.told import failure_on_a_rank

PROJECT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "3",
    "TORCHELASTIC_RUN_ID": "x",
    "OMPI_COMM_WORLD_RANK": "3",
}


def test_what_another_launcher_left_is_dropped_and_what_the_user_set_stays() -> None:
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "SLURM_JOB_ID": "7"}
    environment = {**LEFT_BEHIND, **kept}
    drop_foreign(environment)
    assert environment == kept


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        (GLOO, "eth0"),
        (GLOO, "eth0,lo"),
        (NCCL, "eth"),
        (NCCL, "ib,eth"),
        (NCCL, "=eth0"),
        (NCCL, "^docker"),
        (NCCL, "^eth,ib"),
        (NCCL, "^=eth0"),
    ],
)
def test_a_variable_that_names_an_interface_of_the_node_passes(variable: str, value: str) -> None:
    check_interface(variable, value, ["lo", "eth0", "eth1"])


@pytest.mark.parametrize(
    ("variable", "value"), [(GLOO, "eth"), (GLOO, "eth0,ib0"), (NCCL, "ib"), (NCCL, "=eth"), (NCCL, "^lo,eth"), (NCCL, "^=lo,eth0,eth1")]
)
def test_a_variable_that_fits_no_interface_is_named_with_those_there_are_and_the_fix(variable: str, value: str) -> None:
    with pytest.raises(NoSuchInterface) as caught:
        check_interface(variable, value, ["lo", "eth0", "eth1"])
    said = str(caught.value)
    assert said.startswith(f"{variable}={value}: ")
    assert "it has lo, eth0, eth1. " in said
    assert said.endswith(f"Unset {variable}, or give an interface that every node has")


def test_this_node_s_interfaces_are_asked_if_none_are_given() -> None:
    (_, first), *_ = socket.if_nameindex()
    check_interface(GLOO, first)
    with pytest.raises(NoSuchInterface, match=first):
        check_interface(GLOO, "nowhere7")


@pytest.fixture(scope="module")
def joined() -> dict[str, RankError | float]:
    """What ranks got that joined, in an environment that another launcher has used: the sum over the group, or what was raised."""
    environment = {name: value for name, value in os.environ.items() if name != GLOO} | LEFT_BEHIND
    command = [sys.executable, "-m", "tests.cluster.joining"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=120)
    found: dict[str, RankError | float] = pickle.loads(done.stdout)
    return found


def test_ranks_join_whatever_another_launcher_left_in_the_environment(joined: dict[str, RankError | float]) -> None:
    assert (joined["one of two"], joined["other of two"]) == (3.0, 3.0)


def test_a_rank_that_never_comes_is_named_and_the_attempt_is_tried_again(joined: dict[str, RankError | float]) -> None:
    for case, said in {
        "first alone": "GroupIncomplete: ranks 1, 2 of 3 did not come to the group within 0.3 s",
        "second alone": "GroupIncomplete: rank 0 has not opened the group's store within 0.3 s",
    }.items():
        told = joined[case]
        assert isinstance(told, RankError)
        failure = failure_on_a_rank(told)
        assert (failure.kind, failure.message) == ("infrastructure", said)


def test_an_interface_that_is_not_there_is_the_user_s_mistake_and_explained(joined: dict[str, RankError | float]) -> None:
    told = joined["wrong interface"]
    assert isinstance(told, RankError)
    failure = failure_on_a_rank(told)
    assert (failure.kind, failure.is_explained) == ("user", True)
    assert failure.message.startswith(f"NoSuchInterface: {GLOO}=nowhere7: ")
    assert f"Unset {GLOO}" in failure.message

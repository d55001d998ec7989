"""Claims about the Ray half of a run that need no Ray: resources and the cause of a failure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.config import ClusterConfig
from cluster.launch import ClusterHardware, failure_of, plan_resources, workers_that_fit
from dataio.quarantine import TooManyBadSamples


def hardware(cpus: int, gpus: int = 0) -> ClusterHardware:
    return ClusterHardware(local=True, nodes=1, cpus=cpus, gpus=gpus)


# What each worker gets


@given(st.integers(1, 64), st.integers(1, 128), st.integers(0, 8))
def test_a_plan_never_asks_for_more_than_the_cluster_has(workers: int, cpus: int, gpus: int) -> None:
    try:
        plan = plan_resources(str(workers), ClusterConfig(), hardware(cpus, gpus))
    except ValueError:
        assert 0 < gpus < workers  # the only thing that there can be too little of
        return
    assert plan.workers == workers
    assert 0 < plan.cpus_per_worker * plan.workers <= cpus
    assert plan.gpus_per_worker * plan.workers <= gpus
    assert plan.threads_per_worker >= 1
    assert plan.threads_per_worker <= max(1, plan.cpus_per_worker)


@given(st.integers(1, 64), st.integers(0, 8), st.integers(-1, 8), st.integers(0, 4))
def test_auto_is_one_worker_a_gpu_or_a_single_one(cpus: int, gpus: int, per_gpu: int, cpus_per_worker: int) -> None:
    config = ClusterConfig(gpus_per_worker=per_gpu, cpus_per_worker=cpus_per_worker)
    try:
        plan = plan_resources("auto", config, hardware(cpus, gpus))
    except ValueError:
        return  # an impossible wish, refused below
    each = per_gpu if per_gpu >= 0 else min(gpus, 1)
    assert plan.workers == (gpus // each if each else 1)


def test_too_few_gpus_is_an_error_that_names_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"--workers 4 with 1 GPU each needs 4 GPUs, the cluster has 2; use --workers 2 or .*per-worker 0"):
        plan_resources("4", ClusterConfig(), hardware(8, 2))


def test_too_few_cpus_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--cluster.cpus-per-worker 3 needs 12 CPUs, the cluster has 8"):
        plan_resources("4", ClusterConfig(cpus_per_worker=3), hardware(8))


def test_gpus_may_be_left_unused() -> None:
    plan = plan_resources("4", ClusterConfig(gpus_per_worker=0), hardware(8, 2))
    assert (plan.workers, plan.gpus_per_worker, plan.cpus_per_worker) == (4, 0, 2.0)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 64), st.integers(0, 8))
def test_an_elastic_plan_starts_with_what_fits_and_each_gets_the_same_however_many_there_are(fewest, more, cpus, gpus) -> None:
    try:
        plan = plan_resources(f"{fewest}:{fewest + more}", ClusterConfig(), hardware(cpus, gpus))
    except ValueError:
        assert 0 < gpus < fewest
        return
    assert (plan.fewest, plan.most) == (fewest, fewest + more)
    assert fewest <= plan.workers <= fewest + more
    if gpus and more:
        assert plan.workers <= gpus
    again = plan_resources(f"{fewest}:{fewest + more + 1}", ClusterConfig(), hardware(cpus, gpus))
    if more:
        assert (again.cpus_per_worker, again.threads_per_worker) == (plan.cpus_per_worker, plan.threads_per_worker)


@given(st.lists(st.integers(0, 16), min_size=1, max_size=6).filter(any), st.integers(1, 24))
def test_an_even_share_fits_on_the_nodes_and_no_larger_whole_one_does(node_cpus: list[int], workers: int) -> None:
    plan = plan_resources(
        str(workers), ClusterConfig(), ClusterHardware(local=False, nodes=1, cpus=sum(node_cpus), gpus=0, node_cpus=tuple(node_cpus))
    )
    assert workers_that_fit(plan, [{"CPU": float(cpus)} for cpus in node_cpus]) >= workers
    assert plan.threads_per_worker == max(1, int(plan.cpus_per_worker))
    if plan.cpus_per_worker >= 1:
        assert sum(cpus // int(plan.cpus_per_worker + 1) for cpus in node_cpus) < workers
    else:
        assert sum(node_cpus) < workers  # less than one for each


def test_room_is_counted_node_by_node() -> None:
    plan = plan_resources("1:8", ClusterConfig(cpus_per_worker=2), hardware(16))
    assert workers_that_fit(plan, [{"CPU": 5.0}, {"CPU": 1.0}, {}, {"CPU": 2.0, "GPU": 1.0}]) == 3
    with_gpus = plan_resources("1:8", ClusterConfig(cpus_per_worker=2), hardware(16, 4))
    assert workers_that_fit(with_gpus, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 4.0}]) == 1


# Why an attempt failed: Ray's own exceptions, built as Ray builds them


def group_error(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError(error_message="worker group failed", worker_failures=failures)


def raised(error: Exception) -> RayTaskError:
    """`error` as it comes back from a remote task."""
    return RayTaskError("train_worker", "Traceback: in train_worker", error).as_instanceof_cause()


def test_a_users_exception_comes_back_with_rank_message_and_traceback() -> None:
    failure = failure_of(group_error({1: raised(ZeroDivisionError("division by zero"))}))
    assert (failure.kind, failure.rank) == ("user", 1)
    assert failure.message == "ZeroDivisionError: division by zero"
    assert "in train_worker" in failure.traceback


def test_bad_data_are_told_from_a_users_mistake() -> None:
    failure = failure_of(group_error({0: raised(TooManyBadSamples("9 of 100 samples are bad"))}))
    assert (failure.kind, failure.message) == ("data", "TooManyBadSamples: 9 of 100 samples are bad")


def test_a_dead_process_is_the_cause_and_the_closed_connection_its_echo() -> None:
    died = WorkerHealthCheckFailedError("health check failed", failure=ActorDiedError())
    echo = raised(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"))
    failure = failure_of(group_error({0: echo, 1: died}))
    assert (failure.kind, failure.rank) == ("infrastructure", 1)


def test_a_users_exception_is_the_cause_though_others_lost_their_connection() -> None:
    echo = raised(RuntimeError("Connection reset by peer"))
    failure = failure_of(group_error({0: echo, 3: raised(KeyError("label"))}))
    assert (failure.kind, failure.rank, failure.message) == ("user", 3, "KeyError: 'label'")


def test_a_failure_of_the_controller_has_no_rank() -> None:
    failure = failure_of(ControllerError(ActorDiedError()))
    assert (failure.kind, failure.rank) == ("infrastructure", None)

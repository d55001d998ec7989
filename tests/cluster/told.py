"""The way on which a rank's last words reach the driver, for tests of what they mean there."""

from multiprocessing import Pipe

from cluster.agent import RankEnd
from cluster.failures import Failure, RankError, described
from cluster.launch import failure_of_ranks
from cluster.rank import Calls, serve_calls


def through_a_pipe(error: BaseException | RankError) -> RankError:
    """As a rank says it and its agent hears it."""
    rank, agent = Pipe()
    told: list[RankError] = []
    Calls(rank).failed(error if isinstance(error, RankError) else described(error))
    rank.close()
    serve_calls(agent, lambda *_: None, told.append)
    (said,) = told
    return said


def failure_on_a_rank(error: BaseException | RankError, rank: int = 0) -> Failure:
    """As the driver sees the end of a rank that raised `error`."""
    failure = failure_of_ranks({rank: RankEnd(status=1, error=through_a_pipe(error), killed_by_order=False)})
    assert failure is not None
    return failure

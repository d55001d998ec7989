"""How Ray Train sets up a fleet's workers: it does almost nothing. launch.py passes it in. A module of its own, because Ray Train's
controller imports it too."""

from ray.train.backend import Backend, BackendConfig


class _GpusSeenByAll(Backend):  # type: ignore[misc]
    """No process group: the agents' ranks form their own. NCCL needs every rank of a node to see all of that node's GPUs."""

    share_cuda_visible_devices = True


class AgentsOnly(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _GpusSeenByAll

"""What Ray Train is to set up for a fleet's workers: next to nothing. A module of its own, as Ray Train's controller imports it as well."""

from ray.train.backend import Backend, BackendConfig


class _GpusSeenByAll(Backend):  # type: ignore[misc]
    """No process group: the agents' ranks form their own. NCCL wants every rank of a node to see the GPUs of all of them."""

    share_cuda_visible_devices = True


class AgentsOnly(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _GpusSeenByAll

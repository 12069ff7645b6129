"""Binds a rank to the CPUs next to its GPU.

Host memory follows, because the kernel allocates a page on the NUMA node that first writes to it.
"""

import os

# The job script sets this variable from `numa_binding` in the cluster's file.
NUMA_BINDING = "MEGATRON_POST_NUMA_BINDING"


def bind_to_gpu(local_rank: int) -> None:
    """Bind all present and future threads of this process to the CPUs that the environment asks for.

    Does nothing if the variable is not set. Raises `ValueError` if the binding is impossible on this node.
    """
    mode = os.environ.get(NUMA_BINDING, "")
    if not mode:
        return
    remedy = f"set numa_binding: null in the cluster's file, or unset {NUMA_BINDING}"
    try:
        from torch.numa import binding
    except ImportError as error:
        raise ValueError(f"{NUMA_BINDING}={mode} needs torch 2.9 or newer: {remedy}") from error
    modes = [known.value for known in binding.AffinityMode]
    if mode not in modes:
        raise ValueError(f"{NUMA_BINDING}={mode} is not one of {', '.join(modes)}: {remedy}")
    options = binding.NumaOptions(affinity_mode=binding.AffinityMode(mode))
    try:
        # These functions implement torchrun --numa-binding. torch has no public name for them, and torchrun
        # itself needs the command numactl.
        cpus = binding._get_logical_cpus_to_bind_to(gpu_index=local_rank, numa_options=options)
        if not cpus:
            raise RuntimeError("this process may use none of the CPUs there")
        binding._bind_all_threads_in_current_process_to_logical_cpus(logical_cpu_indices=cpus)
    except Exception as error:
        raise ValueError(
            f"{NUMA_BINDING}={mode} cannot be done for GPU {local_rank}: {error}; {remedy}"
        ) from error

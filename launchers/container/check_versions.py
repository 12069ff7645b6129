"""End with an error if an image lacks one of the named packages, or has it in a version that does not fit.

python3 launchers/container/check_versions.py torch megatron-core transformer-engine NCCL
"""

import sys

from megatron_post.doctor.probes import nccl_version
from megatron_post.installation import installed_versions, unfit_versions

found = {**installed_versions(), "NCCL": nccl_version()}
errors = [f"{name} is not installed" for name in sys.argv[1:] if not found.get(name)]
errors += unfit_versions({name: found[name] for name in sys.argv[1:] if found.get(name)})
print("\n".join(f"{name} {found.get(name)}" for name in sys.argv[1:]))
sys.exit("\n".join(errors) or None)

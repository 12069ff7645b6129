"""What the server of ranks imports once. The stand-in must come before megatron-core."""

from tests.transformer_engine import stand_in

stand_in.install()

import megatron.core  # noqa: E402, F401

import megatron_post.train.run  # noqa: E402, F401

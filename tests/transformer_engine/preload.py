"""What a server of ranks imports once. The stand-in must come before megatron-core."""

import os

from tests.transformer_engine import stand_in

stand_in.install(os.environ["TRANSFORMER_ENGINE_VERSION"])

import megatron.core  # noqa: E402, F401

import megatron_post.train.run  # noqa: E402, F401

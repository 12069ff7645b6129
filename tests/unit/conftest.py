"""Settings that every unit test shares."""

from hypothesis import settings

# how long one example takes depends on what else the machine does
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

"""Settings of all unit tests."""

from hypothesis import settings

# the time of an example depends on the load of the machine
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

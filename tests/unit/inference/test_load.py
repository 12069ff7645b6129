"""What `make inference-load` measures, in small."""

from pathlib import Path

from tests.load import measure


def test_all_requests_are_in_flight_at_once(tmp_path: Path) -> None:
    """100 requests of 1 kB, each answered after half a second, and replayed from a journal of 2 kB each."""
    found = measure(tmp_path, count=100, in_flight=100, seconds=0.5)
    assert found["most in flight at the server"] == 100
    assert found["asked"]["seconds"] < 100 * 0.5 / 4 and 2000 < found["journal, bytes a request"] < 3000
    assert found["replayed"]["requests/s"] > found["asked"]["requests/s"]

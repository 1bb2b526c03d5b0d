"""Measures as somebody prints them."""

from effc.compiler.artifacts.manifest import Measure
from effc.compiler.artifacts.measures import Measures


def test_measures_print_as_a_table_and_are_a_mapping():
    measures = Measures(
        {
            "bytes": Measure("bytes", "B", 4 * 2**20, 2**20, 0.25),
            "divergence(x)": Measure("divergence(x)", "nats/token", None, 0.125),
            "decode.p50": Measure("decode.p50", "ms", None, None, untimed="no cache"),
        }
    )
    assert repr(measures).splitlines() == [
        "metric         original          compiled   change",
        "bytes          4.00 MiB          1.00 MiB  -75.0 %",
        "divergence(x)            0.125 nats/token",
        "decode.p50                       no cache",
    ]
    assert measures["bytes"].ratio == 0.25 and dict(measures) == measures
    assert str(Measures()).splitlines() == ["metric  original  compiled  change"]

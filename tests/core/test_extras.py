"""What to do where something optional is not installed."""

from kvbm.core.extras import installing


def test_the_packages_are_named_and_not_this_distribution() -> None:
    assert installing("route").startswith("pip install 'aiohttp>=")
    assert installing("nixl").startswith("pip install nixl-cu12==")

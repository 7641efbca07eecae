"""hypothesis; where it is not installed, tests of drawn problems are skipped and the others of their file run."""

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    import pytest

    class Anything:
        """Whatever is asked of it."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **options):
            return self

    st = Anything()

    def settings(**options):
        return lambda test: test

    def given(*args, **options):
        def skipped(*self):
            pytest.skip("hypothesis is not installed")

        return lambda test: skipped


__all__ = ["given", "settings", "st"]

import jax
import pytest


@pytest.fixture
def mixed_dtypes():
    """optax itself relies on implicit promotion, which the tests otherwise forbid."""
    with jax.numpy_dtype_promotion('standard'):
        yield

"""The form in which a model keeps its parameters, and the one that some hardware wants."""

import jax
import jax.numpy as jnp


def with_outputs_first(params: dict, dtype: jnp.dtype) -> dict:
    """The same parameters, the matrices of the layers as `(outputs, inputs)`, in two axes each.

    They are rounded to the dtype that is multiplied.

    In this form they stand on the left of a product (`Llama.outputs_first`,
    `Backend.weights_left`). Tables are in it already, and are shared.
    """

    def turned(name: str, w: jax.Array) -> jax.Array:
        if w.ndim == 1 or name.endswith('_bias'):
            return w
        outputs = w.shape[-1] if name == 'o' else w.size // w.shape[0]
        return w.reshape(-1, outputs).T.astype(dtype)

    def turned_layer(layer: dict) -> dict:
        return {name: turned(name, w) for name, w in layer.items()}

    layers = {name: turned_layer(x) for name, x in params.items() if name.startswith('layers_')}
    return {**params, **layers}

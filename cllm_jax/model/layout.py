"""The form in which a model keeps its parameters, and the one that some hardware wants."""

import jax


def with_outputs_first(params: dict) -> dict:
    """The same parameters, the matrices of the layers as `(outputs, inputs)`, in two axes each.

    In this form they stand on the left of a product (`Llama.outputs_first`,
    `Backend.weights_left`). Tables are in it already, and are shared.
    """

    def turned(name: str, w: jax.Array) -> jax.Array:
        if w.ndim == 1 or name.endswith('_bias'):
            return w
        outputs = w.shape[-1] if name == 'o' else w.size // w.shape[0]
        return w.reshape(-1, outputs).T

    def turned_layer(layer: dict) -> dict:
        return {name: turned(name, w) for name, w in layer.items()}

    layers = {name: turned_layer(x) for name, x in params.items() if name.startswith('layers_')}
    return params | layers

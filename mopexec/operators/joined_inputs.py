"""What is before the layer of an MTP module (arXiv 2412.19437, 2.2): hidden states and the embeddings of the
tokens that follow, each normed, projected to one. The projection's halves are two products: the pair is not
put together. Weights and gradients are the module's by their names in it.
"""

from torch import Tensor

from mopexec.measure.tracker import component, phase
from mopexec.operators.norms import LayerNorms, Weights
from mopexec.operators.rows import add_matmul


def join(hidden: Tensor, embedded: Tensor, weights: Weights, norms: LayerNorms) -> Tensor:
    """[N, H] of both, a new tensor."""
    with component("vocabulary"):
        of_embedded, of_hidden = weights["projection.weight"].chunk(2, dim=1)
        normed = norms.forward(embedded, weights, "embedding_norm")
        joined = normed @ of_embedded.t()
        del normed
        normed = norms.forward(hidden, weights, "hidden_norm")
        return joined.addmm_(normed, of_hidden.t())


def hidden_backward(
    grad: Tensor, hidden: Tensor, weights: Weights, grads: Weights, norms: LayerNorms, grad_hidden: Tensor
) -> None:
    """grad [N, H] of the joined: grad_hidden [N, H] += that of the hidden states; grads += the weights'."""
    with component("vocabulary"), phase("backward"):
        found = _product_backward(1, grad, hidden, weights, grads, norms)
        norms.backward_(grad_hidden, hidden, found, weights, grads, "hidden_norm")


def embedded_backward(
    grad: Tensor, embedded: Tensor, weights: Weights, grads: Weights, norms: LayerNorms
) -> None:
    """grad [N, H] of the joined becomes that of the embeddings, in place; grads += the weights'."""
    with component("vocabulary"), phase("backward"):
        found = _product_backward(0, grad, embedded, weights, grads, norms)
        norms.backward_(grad, embedded, found, weights, grads, "embedding_norm", add=False)


def _product_backward(
    half: int, grad: Tensor, x: Tensor, weights: Weights, grads: Weights, norms: LayerNorms
) -> Tensor:
    """Gradient of the normed x; that of its half of the projection is added."""
    normed = norms.forward(x, weights, ("embedding_norm", "hidden_norm")[half])
    add_matmul(grads["projection.weight"].chunk(2, dim=1)[half], grad.t(), normed)
    del normed
    return grad @ weights["projection.weight"].chunk(2, dim=1)[half]

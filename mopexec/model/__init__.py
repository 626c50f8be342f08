"""The single-device MoE transformer: plain modules without any parallelism, which compute by the forwards of
`operators`.
"""

from mopexec.model.routing import Routing
from mopexec.model.support import check_model
from mopexec.model.transformer import Transformer

__all__ = ["Routing", "Transformer", "check_model"]

"""A reasoning guard for vision-language systems, trained and served in JAX.

from gvl_jax import Guard
guard = Guard.from_pretrained("runs/demo/rl/model")
guard.moderate(request="…", response=None, images=["picture.png"]).flagged
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gvl_jax.moderate import Guard, Judgement

__all__ = ["Guard", "Judgement"]


def __getattr__(name: str) -> Any:
    """`Guard` on first use: importing the package alone starts no JAX, so input workers stay light."""
    if name in __all__:
        from gvl_jax import moderate

        return getattr(moderate, name)
    raise AttributeError(f"module 'gvl_jax' has no attribute {name!r}")

"""What each expert likes: the patches that its router is surest to send it.

Axes: E experts, n patches of each, B images, P patches of an image, p pixels of a patch, c channels.
"""

import dataclasses

import numpy as np

from bvit_jax.opened import Images
from bvit_jax.seen_routing import SeenRouting


@dataclasses.dataclass(frozen=True, eq=False)
class Favourites:
    """The patches that each expert of one layer is most probable for, of each image one at most.

    Attributes:
        layer: number of the layer.
        places_Exnx3: int64 (E, n, 3), image, row and column of each, the most probable first.
        probs_Exn: float32, their routing probabilities.
    """

    layer: int
    places_Exnx3: np.ndarray
    probs_Exn: np.ndarray

    def cut(self, images: Images, patch_size: int) -> np.ndarray:
        """Returns the patches themselves, uint8 (E, n, p, p, c), of the images that were routed."""
        experts, count, _ = self.places_Exnx3.shape
        found = np.empty((experts, count, patch_size, patch_size, images.pixels.shape[-1]), images.pixels.dtype)
        for place in np.ndindex(experts, count):
            image, row, column = self.places_Exnx3[place]
            top, left = row * patch_size, column * patch_size
            found[place] = images.pixels[image, top : top + patch_size, left : left + patch_size]
        return found


def favourites(seen: SeenRouting, count: int = 8) -> list[Favourites]:
    """Finds them for each layer; of equally probable patches the first.

    One patch of an image at most, for neighbours are much alike.

    Args:
        seen: a routing.
        count: patches an expert; as many as there are images if these are fewer.
    """
    return [_of_layer(seen, index, count) for index in range(len(seen.layers))]


def _of_layer(seen: SeenRouting, index: int, count: int) -> Favourites:
    probs_ExBxP = np.moveaxis(seen.probs_MxBxTxE[index, :, 1:], -1, 0)
    patch_ExB, prob_ExB = probs_ExBxP.argmax(axis=2), probs_ExBxP.max(axis=2)
    image_Exn = np.argsort(-prob_ExB, axis=1, kind="stable")[:, :count]
    patch_Exn, probs_Exn = (np.take_along_axis(leaf, image_Exn, axis=1) for leaf in (patch_ExB, prob_ExB))
    places_Exnx3 = np.stack([image_Exn, *np.divmod(patch_Exn, seen.grid[1])], axis=-1)
    return Favourites(seen.layers[index], places_Exnx3, probs_Exn)

"""Write a submission: the guesses for test images whose labels are not public, as ILSVRC's evaluation server takes them."""

from pathlib import Path

from torch import Tensor

from alexnet_repro.data.manifest import AGAIN
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.files import written_whole

GUESSES = 5


def refuse_gaps(store: Store) -> None:
    """Raise UserError if an unlabelled image was left out of the store: each needs a line."""
    bad = [*store.manifest.get("left_out_before", ()), *store.manifest.get("bad", ())]
    left_out = [name for name in bad if name.startswith("unlabelled/")]
    if left_out:
        raise UserError(
            f"the store {store.path} lacks {len(left_out)} of the images to be submitted, such as {left_out[0]}",
            "download the archive of the test images again, then " + AGAIN,
        )


def write_submission(path: Path, softmax: Tensor, store: Store) -> str:
    """Write the five most probable classes of each image, most probable first, and return what they are.

    The format is that of the development kit of ILSVRC2012: one line per image, in the order of the images' names, with
    the numbers of the classes in the kit (1 to 1000), separated by spaces. WordNet IDs stand for the numbers if the
    store was prepared without the kit.

    softmax: (N, classes).
    """
    numbers = store.manifest.get("class_numbers")
    names = [str(number) for number in numbers] if numbers else store.classes
    guesses = softmax.topk(min(GUESSES, len(names)), 1).indices.tolist()
    with written_whole(path) as file:
        file.write("".join(" ".join(names[label] for label in row) + "\n" for row in guesses).encode())
    return (
        "the kit's numbers of the classes" if numbers else "WordNet IDs, since the store was prepared without the kit"
    )

"""Patches (8.1) and their positions on grids of any size (8.2)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.testing import Close, Subject, Where, also, is_tensor, refuses, requirement

from .reference import randomize, value

E = 3
# 8.1 patches


def patches_of(
    subject: Subject, rng: torch.Generator, grid: int = 2, patch: int = 2, channels: int = 3, positions: bool = False
) -> Any:
    """The learner's PatchEmbedding in float64 with random weights; without `positions` its table is zero."""
    layer = subject.PatchEmbedding(grid * patch, patch, E, channels)
    proj, table = getattr(layer, "proj", None), getattr(layer, "position_embedding", None)
    assert isinstance(proj, nn.Conv2d), f"PatchEmbedding.proj: a {type(proj).__name__} came, nn.Conv2d was wanted"
    wanted = (E, channels, patch, patch)
    assert tuple(proj.weight.shape) == wanted, (
        f"PatchEmbedding.proj.weight: shape {tuple(proj.weight.shape)} came, {wanted} was wanted"
    )
    assert isinstance(table, nn.Parameter), (
        f"PatchEmbedding.position_embedding: a {type(table).__name__} came, nn.Parameter was wanted"
    )
    assert tuple(table.shape) == (grid**2, E), (
        f"PatchEmbedding.position_embedding: shape {tuple(table.shape)} came, {(grid**2, E)} was wanted"
    )
    layer.double()
    randomize(
        rng, proj.weight, is_tensor(proj.bias.data if proj.bias is not None else None, "PatchEmbedding.proj.bias")
    )
    randomize(rng, table, scale=1.0 if positions else 0.0)
    return layer


def cut(layer: Any, images: Tensor, order: str = "rows") -> Tensor:
    """Each patch times proj's weight, plus its bias, in float64: [M, (H/P)·(W/P), E]."""
    weight, bias = (value(p).double() for p in (layer.proj.weight, layer.proj.bias))
    p, rows, columns = weight.shape[-1], images.shape[2] // weight.shape[-1], images.shape[3] // weight.shape[-1]
    if order == "columns":
        places = [(row, column) for column in range(columns) for row in range(rows)]
    else:
        places = [(row, column) for row in range(rows) for column in range(columns)]
    found = [images[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten(1) for row, column in places]
    flat = weight.permute(0, 2, 3, 1) if order == "channels last" else weight
    return torch.stack(found, 1).double() @ flat.flatten(1).T + bias


def patch_slip(layer: Any, images: Tensor, output: Tensor) -> str:
    """Which other way to cut gives the output."""
    for order, words in (
        ("columns", "the patches come column by column; row by row is wanted"),
        ("channels last", "the numbers of a patch are in the order (P, P, C); proj's weight has (C, P, P)"),
    ):
        if torch.allclose(output.detach().double(), cut(layer, images, order), atol=1e-6):
            return words
    return "token r·(W/P) + c is patch (r, c), by proj's weight and bias"


@requirement("8.1")
def test_patches_by_hand(subject: Subject) -> None:
    """An image that counts its pixels, and a weight that takes the first and the last number of a patch."""
    layer = subject.PatchEmbedding(4, 2, 2, channels=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.proj.weight[0, 0, 0, 0] = 1
        layer.proj.weight[1, 1, 1, 1] = 1
        layer.proj.bias.copy_(torch.tensor([0.0, 0.5]))
    image = torch.arange(16, dtype=torch.float64).view(4, 4)

    output = is_tensor(layer(torch.stack([image, image + 100])[None]), "PatchEmbedding.forward(images)")

    came, wanted = output.detach().tolist(), [[[0, 105.5], [2, 107.5], [8, 113.5], [10, 115.5]]]
    assert came == wanted, (
        f"PatchEmbedding.forward, pixels 0 to 15 and 100 to 115, P = 2, first and last number of each patch, + 0.5: "
        f"{came} came, {wanted} was wanted"
    )


@requirement("8.1")
def test_patches_are_a_linear_map(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Each patch by proj's weight and bias, with gradients, for any number of channels, wide and tall."""
    for channels, patch, size in ((3, 2, (4, 4)), (1, 3, (3, 9)), (4, 2, (8, 2)), (2, 1, (3, 2)), (5, 4, (4, 4))):
        layer = patches_of(subject, rng, patch=patch, channels=channels)
        images = torch.randn(3, channels, *size, generator=rng, dtype=torch.float64, requires_grad=True)
        given = value(images).requires_grad_()
        expected = cut(layer, images)
        probe = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
        (expected * probe).sum().backward()
        what = f"PatchEmbedding.forward(images {list(images.shape)}), P = {patch}"

        output = is_tensor(layer(given), what)

        with also(patch_slip, layer, images.detach(), output):
            close(output, expected, what)
        (output * probe).sum().backward()
        close(given.grad, is_tensor(images.grad, ""), f"{what}, backward: gradient of images")
        close(layer.proj.bias.grad, probe.sum((0, 1)), f"{what}, backward: gradient of proj.bias")


@requirement("8.1")
def test_images_of_any_strides(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Images of any strides give the same tokens, and are not written to."""
    layer = patches_of(subject, rng)
    images = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    for layout, strided in {
        "transposed": images.mT,
        "sliced": torch.stack([images, images], -1)[..., 1],
        "expanded": images[:, :, :1].expand(2, 3, 4, 4),
        "channels last": images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "overlapping": images.flatten().as_strided((2, 3, 4, 4), (7, 5, 4, 1)),
    }.items():
        kept, version, expected = value(strided), strided._version, cut(layer, strided)

        output = layer(strided)

        close(output, expected, f"PatchEmbedding.forward(images, {layout})")
        written = not torch.equal(strided, kept) or strided._version != version
        assert not written, f"PatchEmbedding.forward(images, {layout}): the images are written to"


@requirement("8.1")
def test_bad_sides_are_refused(subject: Subject, rng: torch.Generator) -> None:
    """A side that is no multiple of P is a ValueError with that side and P, not cut off."""
    for patch, height, width, bad in ((5, 10, 7, 7), (5, 12, 10, 12), (4, 4, 2, 2), (3, 1, 6, 1), (2, 5, 4, 5)):
        layer = patches_of(subject, rng, patch=patch)
        images = torch.zeros(1, 3, height, width, dtype=torch.float64)

        what = f"PatchEmbedding.forward, {height} × {width} pixels, P = {patch}"
        refuses(ValueError, partial(layer, images), what, bad, patch)


@requirement("8.1")
def test_new_patch_weights_count_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A call after proj has changed, by .data too, uses the new weights."""
    layer = patches_of(subject, rng)
    images = torch.randn(2, 3, 4, 6, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        layer.eval()(images)
        for parameter in layer.proj.parameters():
            randomize(rng, parameter.data)
            close(layer(images), cut(layer, images), "PatchEmbedding.forward after an edit of proj by .data")


@requirement("8.1")
def test_patches_agree_with_unfold(subject: Subject, close: Close, rng: torch.Generator, on: Where) -> None:
    """Tokens are those of F.unfold and a linear map, on any device and in any dtype."""
    layer = patches_of(subject, rng)
    images = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    flat = F.unfold(images, 2, stride=2).mT
    expected = F.linear(flat, value(layer.proj.weight).flatten(1), value(layer.proj.bias))

    output = layer.to(on.device, on.dtype)(images.to(on.device, on.dtype))

    close(output, expected.to(on.device, on.dtype), "PatchEmbedding.forward(images)")


# 8.2 positions


def table_on(table: Tensor, rows: int, columns: int, **how: Any) -> Tensor:
    """A table [G·G, E] for another grid, [rows·columns, E], in float64."""
    side = round(len(table) ** 0.5)
    square = table.double().T.unflatten(1, (side, side))[None]
    kinds: dict[str, Any] = {"mode": "bicubic", "align_corners": False} | how
    return F.interpolate(square, size=(rows, columns), **kinds)[0].flatten(1).T


def position_slip(table: Tensor, rows: int, columns: int, output: Tensor) -> str:
    """Which other rule for the positions gives the output."""
    came, side = output.detach().double(), round(len(table) ** 0.5)
    turned = table.double().unflatten(0, (side, side)).transpose(0, 1).flatten(0, 1)
    found = {
        "the table is added column by column": table_on(turned, rows, columns),
        "the grid's rows and columns are swapped": table_on(table, columns, rows),
        "the table is resized with align_corners=True": table_on(table, rows, columns, align_corners=True),
        "the table is resized with antialias=True": table_on(table, rows, columns, antialias=True),
        "the table is resized by bilinear interpolation": table_on(table, rows, columns, mode="bilinear"),
        "the table is resized by nearest": table_on(table, rows, columns, mode="nearest", align_corners=None),
        "no positions are added": torch.zeros_like(came[0]),
        "the first rows of the table are taken, it is not resized": table.double()[: rows * columns],
    }
    if rows <= side and columns <= side:
        found["the table is cut, not resized"] = (
            table.double().unflatten(0, (side, side))[:rows, :columns].flatten(0, 1)
        )
    for words, other in found.items():
        if other.shape == came.shape[1:] and torch.allclose(came, other.expand_as(came), atol=1e-4):
            return words
    return f"the table of {side} × {side} positions is resized to {rows} × {columns}"


def silent(subject: Subject, rng: torch.Generator, grid: int, dtype: torch.dtype = torch.float64) -> Any:
    """A PatchEmbedding of 2 × 2 patches whose proj gives zeros, so that its output is the positions."""
    layer = patches_of(subject, rng, grid, positions=True).to(dtype)
    with torch.no_grad():
        for parameter in layer.proj.parameters():
            parameter.zero_()
    return layer


@requirement("8.2")
def test_positions_by_hand(subject: Subject) -> None:
    """2 × 2 positions 0 32 64 96: on 1 × 4 patches 28.625 39.25 56.75 67.375."""
    layer = subject.PatchEmbedding(4, 2, 1, channels=1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.position_embedding.copy_(torch.tensor([[0.0], [32], [64], [96]]))
    for size, wanted in (
        ((4, 4), [0.0, 32, 64, 96]),
        ((2, 8), [28.625, 39.25, 56.75, 67.375]),
        ((2, 4), [32.0, 64]),
        ((4, 2), [16.0, 80]),
    ):
        output = is_tensor(layer(torch.zeros(1, 1, *size, dtype=torch.float64)), "PatchEmbedding.forward(images)")

        came = [round(one, 3) for one in output.detach().flatten().tolist()]
        table, grid = value(layer.position_embedding), (size[0] // 2, size[1] // 2)
        # Of two patches alone no rule can be told.
        with also(position_slip if size[1] > 2 * size[0] or size == (4, 4) else lambda *_: "", table, *grid, output):
            assert came == wanted, (
                f"PatchEmbedding.forward, P = 2, positions 0 32 / 64 96, on {size[0] // 2} × {size[1] // 2} patches: "
                f"{came} came, {wanted} was wanted"
            )


@requirement("8.2")
def test_the_own_grid_gets_the_table_itself(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """On G × G patches the positions are added as they are, bit for bit."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = silent(subject, rng, 3, dtype)
        table = value(layer.position_embedding)

        output = layer(torch.randn(2, 3, 6, 6, generator=rng).to(dtype))

        what = f"PatchEmbedding.forward in {dtype} on its own 3 × 3 grid: positions"
        with also(position_slip, table, 3, 3, is_tensor(output, what)):
            close(output, table.expand(2, 9, E), what, tolerance=0)


@requirement("8.2")
def test_other_grids_get_a_resized_table(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Smaller, larger, wide and tall grids, with as many patches too: bicubic, with gradients for the table."""
    for grid, grids in ((4, ((4, 4), (2, 2), (6, 6), (3, 5), (2, 8), (16, 1))), (3, ((4, 3), (3, 2))), (1, ((2, 3),))):
        layer = silent(subject, rng, grid)
        for rows, columns in grids:
            table = value(layer.position_embedding).requires_grad_()
            expected = table_on(table, rows, columns).expand(2, -1, -1)
            probe = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
            (expected * probe).sum().backward()
            what = f"PatchEmbedding.forward on {rows} × {columns} patches, {grid} × {grid} positions"
            layer.zero_grad()

            output = is_tensor(layer(torch.zeros(2, 3, 2 * rows, 2 * columns, dtype=torch.float64)), what)

            with also(position_slip, table.detach(), rows, columns, output):
                close(output, expected, what, tolerance=1e-5)
            (output * probe).sum().backward()
            gradient = layer.position_embedding.grad
            assert gradient is not None, f"{what}, backward: position_embedding gets no gradient"
            wanted = is_tensor(table.grad, "")
            close(gradient, wanted, f"{what}, backward: gradient of position_embedding", tolerance=1e-5)


@requirement("8.2")
def test_a_bfloat16_table(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """A bfloat16 table is resized in float32 or better, and rounded once."""
    layer = silent(subject, rng, 4, torch.bfloat16)
    layer.position_embedding.data.mul_(64)
    for rows, columns in ((5, 5), (2, 3)):
        expected = table_on(value(layer.position_embedding), rows, columns)[None]
        what = f"PatchEmbedding.forward in bfloat16 on {rows} × {columns} patches, 4 × 4 positions"

        output = is_tensor(layer(torch.zeros(1, 3, 2 * rows, 2 * columns, dtype=torch.bfloat16)), what)

        assert output.dtype == torch.bfloat16, f"{what}: {output.dtype} came, torch.bfloat16 was wanted"
        hint = "one rounding to bfloat16 is within 0.004 of the value; is the table resized in bfloat16?"
        close(output.double(), expected, what, tolerance=4e-3, hint=hint)


@requirement("8.2")
def test_a_changed_table_counts_at_once(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """The next call on any grid uses the table as it is then, edits of .data too, also after other grids."""
    layer = silent(subject, rng, 2).eval()
    with torch.no_grad():
        for rows, columns in ((2, 2), (3, 3), (2, 3), (3, 3), (3, 2), (2, 2)):
            images = torch.zeros(1, 3, 2 * rows, 2 * columns, dtype=torch.float64)
            layer(images)
            randomize(rng, layer.position_embedding.data)

            expected = table_on(layer.position_embedding, rows, columns)[None]
            what = f"PatchEmbedding.forward on {rows} × {columns} patches after an edit of position_embedding.data"
            close(layer(images), expected, what, tolerance=1e-5, hint="is the resized table kept from before?")


@requirement("8.2")
def test_patches_and_positions_together(subject: Subject, close: Close, rng: torch.Generator) -> None:
    """Tokens are patches plus positions; G is image_size // patch_size, rounded down."""
    layer = subject.PatchEmbedding(7, 2, E).double()
    came = tuple(layer.position_embedding.shape)
    assert came == (9, E), f"PatchEmbedding(7, 2, 3).position_embedding: shape {came} came, (9, 3) was wanted"
    randomize(rng, *layer.parameters())
    for size in ((6, 6), (4, 10)):
        images = torch.randn(2, 3, *size, generator=rng, dtype=torch.float64)
        table = value(layer.position_embedding)
        layer.position_embedding.data.zero_()
        what = f"PatchEmbedding.forward(images {size[0]} × {size[1]})"
        patches = is_tensor(layer(images), what).detach()
        layer.position_embedding.data.copy_(table)

        output = layer(images)

        expected = patches + table_on(table, size[0] // 2, size[1] // 2)
        close(output, expected, f"{what}, beside what it gives with a table of zeros", tolerance=1e-5)

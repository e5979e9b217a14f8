"""Wrong answers to patches (8.1) and their positions (8.2)."""

from harness.model.bank import Mistake

GRID = "        self.grid = image_size // patch_size\n"
PROJ = "        self.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)\n"
REFUSE = """        for side in images.shape[-2:]:
            if side % self.patch_size:
                raise ValueError(f"a side of {side} is no multiple of the patch size {self.patch_size}")
"""
PATCHES = "        patches = self.proj(images)  # [M, embed_dim, H/P, W/P]\n"
RETURN = "        return patches.flatten(2).mT + self._positions(*patches.shape[2:])  # [M, (H/P)·(W/P), embed_dim]\n"
OWN = """        if (rows, columns) == (self.grid, self.grid):
            return table
"""
SQUARE = "        square = table.to(_at_least_float32(table)).unflatten(0, (self.grid, self.grid)).permute(2, 0, 1)\n"
RESIZE = '        resized = F.interpolate(square[None], size=(rows, columns), mode="bicubic", align_corners=False)\n'
RESIZED = "        return resized[0].flatten(1).mT.to(table.dtype)  # [rows·columns, embed_dim]\n"
CELLS = "images.unfold(2, self.patch_size, self.patch_size).unfold(3, self.patch_size, self.patch_size)"

MISTAKES = [
    # 8.1
    Mistake(
        "zero_patches",
        ("8.1", "8.2"),
        "was wanted",
        (RETURN, RETURN.replace("patches.flatten", "0 * patches.flatten").replace("self._pos", "0 * self._pos")),
    ),
    Mistake("images_given_back", ("8.1", "8.2"), "was wanted", (RETURN, "        return images\n")),
    Mistake("no_patches", "8.1", "was wanted", ("patches.flatten(2).mT +", "0 * patches.flatten(2).mT +"), only=True),
    Mistake(
        "patches_column_by_column",
        "8.1",
        "115.5",
        (RETURN, RETURN.replace("patches.flatten", "patches.mT.flatten")),
        only=True,
    ),
    Mistake(
        "channels_last_in_a_patch",
        "8.1",
        "was wanted",
        (
            PATCHES,
            f"""        cells = {CELLS}
        flat = F.linear(cells.permute(0, 2, 3, 4, 5, 1).flatten(3), self.proj.weight.flatten(1), self.proj.bias)
        patches = flat.permute(0, 3, 1, 2)
""",
        ),
        only=True,
    ),
    Mistake(
        "patches_transposed",
        "8.1",
        "was wanted",
        (PATCHES, "        patches = F.conv2d(images, self.proj.weight.mT, self.proj.bias, stride=self.patch_size)\n"),
        only=True,
    ),
    Mistake("sides_cut_off", "8.1", "was accepted", (REFUSE, ""), only=True),
    Mistake("width_not_checked", "8.1", "10 × 7 pixels", ("images.shape[-2:]:", "images.shape[-2:-1]:"), only=True),
    Mistake("height_not_checked", "8.1", "12 × 10 pixels", ("images.shape[-2:]:", "images.shape[-1:]:"), only=True),
    Mistake(
        "area_checked",
        "8.1",
        "10 × 7 pixels",
        (
            REFUSE,
            """        side = images.shape[-1] * images.shape[-2]
        if side % self.patch_size:
            raise ValueError(f"a side of {side} is no multiple of the patch size {self.patch_size}")
""",
        ),
        only=True,
    ),
    Mistake("no_patch_size_in_the_error", "8.1", "lacks 5", (' {self.patch_size}")', '")'), only=True),
    Mistake("no_side_in_the_error", "8.1", "lacks 7", ("a side of {side} is", "a side is"), only=True),
    Mistake(
        "assert_for_sides",
        "8.1",
        "AssertionError",
        (REFUSE, "        assert not images.shape[-1] % self.patch_size and not images.shape[-2] % self.patch_size\n"),
        only=True,
    ),
    Mistake(
        "no_bias",
        "8.1",
        "was wanted",
        (PATCHES, "        patches = F.conv2d(images, self.proj.weight, stride=self.patch_size)\n"),
        only=True,
    ),
    Mistake("three_channels", "8.1", "3 channels", (PROJ, PROJ.replace("channels,", "3,")), only=False),
    Mistake(
        "patch_images_detached",
        "8.1",
        "gradient of images",
        ("self.proj(images)", "self.proj(images.detach())"),
        only=True,
    ),
    Mistake(
        "patch_bias_detached",
        "8.1",
        "gradient of proj.bias",
        (
            PATCHES,
            "        patches = F.conv2d(images, self.proj.weight, self.proj.bias.detach(), stride=self.patch_size)\n",
        ),
        only=True,
    ),
    Mistake(
        "strides_ignored",
        "8.1",
        "was wanted",
        (
            PATCHES,
            (
                "        m, c, h, w = images.shape\n"
                "        images = images.as_strided((m, c, h, w), (c * h * w, h * w, w, 1))\n"
            )
            + PATCHES,
        ),
        only=True,
    ),
    Mistake(
        "images_scaled_and_back",
        "8.1",
        "PatchEmbedding.forward",
        (PATCHES, "        with torch.no_grad():\n            images.mul_(2).div_(2)\n" + PATCHES),
        only=True,
    ),
    Mistake(
        "proj_weight_of_the_first_call",
        "8.1",
        "after an edit of proj by .data",
        (
            PATCHES,
            """        if not torch.is_grad_enabled():
            self._weight = getattr(self, "_weight", self.proj.weight.detach().clone())
            patches = F.conv2d(images, self._weight, self.proj.bias, stride=self.patch_size)
        else:
            patches = self.proj(images)
""",
        ),
    ),
    # 8.2
    Mistake(
        "positions_transposed",
        "8.2",
        "column by column",
        (
            "        table = self.position_embedding\n",
            (
                "        table = self.position_embedding.unflatten(0, (self.grid, "
                "self.grid)).transpose(0, 1).flatten(0, 1)\n"
            ),
        ),
        only=True,
    ),
    Mistake("resized_positions_transposed", "8.2", "was wanted", ("permute(2, 0, 1)", "permute(2, 1, 0)"), only=True),
    Mistake(
        "rows_and_columns_swapped",
        "8.2",
        "column by column",
        ("size=(rows, columns)", "size=(columns, rows)"),
        only=True,
    ),
    Mistake(
        "positions_not_resized",
        "8.2",
        "was wanted",
        (SQUARE + RESIZE + RESIZED, "        return table[: rows * columns]\n"),
    ),
    Mistake(
        "positions_cut",
        "8.2",
        "[32.0, 64] was wanted",
        (
            OWN,
            OWN
            + (
                "        if rows <= self.grid and columns <= self.grid:\n"
                "            return table.unflatten(0, (self.grid, self.grid))[:rows, :columns].flatten(0, 1)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "positions_repeated",
        "8.2",
        "was wanted",
        (
            SQUARE + RESIZE + RESIZED,
            "        return table.repeat(rows * columns // len(table) + 1, 1)[: rows * columns]\n",
        ),
        only=True,
    ),
    Mistake(
        "corners_aligned",
        "8.2",
        "align_corners=True",
        (RESIZE, RESIZE.replace("align_corners=False", "align_corners=True")),
        only=True,
    ),
    Mistake(
        "antialiased",
        "8.2",
        "antialias=True",
        (RESIZE, RESIZE.replace("align_corners=False", "align_corners=False, antialias=True")),
        only=True,
    ),
    Mistake("bilinear", "8.2", "bilinear", (RESIZE, RESIZE.replace("bicubic", "bilinear")), only=True),
    Mistake(
        "nearest",
        "8.2",
        "nearest",
        (RESIZE, RESIZE.replace(('"bicubic", align_corners=False'), '"nearest"')),
        only=True,
    ),
    Mistake(
        "kept_for_as_many_patches",
        "8.2",
        "was wanted",
        ("(rows, columns) == (self.grid, self.grid)", "rows * columns == self.grid**2"),
        only=True,
    ),
    Mistake(
        "kept_for_as_many_rows",
        "8.2",
        "size of tensor",
        ("(rows, columns) == (self.grid, self.grid)", "rows == self.grid"),
        only=False,
    ),
    Mistake(
        "resized_to_a_square",
        "8.2",
        "was wanted",
        ("size=(rows, columns)", "size=(round((rows * columns) ** 0.5),) * 2"),
    ),
    Mistake(
        "no_positions", "8.2", "no positions are added", (RETURN, RETURN.replace("+ self", "+ 0 * self")), only=True
    ),
    Mistake(
        "no_positions_on_other_grids",
        "8.2",
        "no positions are added",
        (RESIZED, RESIZED.replace("resized[0]", "0 * resized[0]")),
        only=True,
    ),
    Mistake(
        "resized_in_bfloat16",
        "8.2",
        "is the table resized in bfloat16",
        ("table.to(_at_least_float32(table))", "table"),
        only=True,
    ),
    Mistake(
        "table_through_float32",
        "8.2",
        "torch.float64 on its own",
        (OWN, OWN.replace("return table", "return table.float().to(table.dtype)")),
        only=True,
    ),
    Mistake(
        "table_detached",
        "8.2",
        "gradient",
        ("table.to(_at_least_float32(table))", "table.detach().to(_at_least_float32(table))"),
        only=True,
    ),
    Mistake("own_table_detached", "8.2", "gradient", (OWN, OWN.replace("return table", "return table.detach()"))),
    Mistake(
        "resized_table_kept",
        "8.2",
        "is the resized table kept",
        (
            "    def _positions(self, rows: int, columns: int) -> Tensor:\n",
            """    def _positions(self, rows: int, columns: int) -> Tensor:
        kept = self.__dict__.setdefault("_kept", {})
        if torch.is_grad_enabled() or (rows, columns) not in kept:
            kept[rows, columns] = self._new_positions(rows, columns)
        return kept[rows, columns]

    def _new_positions(self, rows: int, columns: int) -> Tensor:
""",
        ),
        only=True,
    ),
    Mistake(
        "resized_table_kept_by_version",
        "8.2",
        "is the resized table kept",
        (
            "    def _positions(self, rows: int, columns: int) -> Tensor:\n",
            """    def _positions(self, rows: int, columns: int) -> Tensor:
        kept, key = self.__dict__.setdefault("_kept", {}), (rows, columns, self.position_embedding._version)
        if torch.is_grad_enabled() or key not in kept:
            kept[key] = self._new_positions(rows, columns)
        return kept[key]

    def _new_positions(self, rows: int, columns: int) -> Tensor:
""",
        ),
        only=True,
    ),
    Mistake(
        "grid_rounded_up",
        "8.2",
        "(9, 3) was wanted",
        (GRID, "        self.grid = -(-image_size // patch_size)\n"),
        only=True,
    ),
    Mistake("no_positions_in_eval", "8.2", "was wanted", (RETURN, RETURN.replace("+ self", "+ self.training * self"))),
    Mistake(
        "positions_of_a_larger_table_first",
        "8.2",
        "was wanted",
        (OWN, OWN + "        if (rows, columns) == (1, 1):\n            return table[:1]\n"),
        only=True,
    ),
]

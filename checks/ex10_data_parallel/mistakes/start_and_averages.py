"""Wrong answers to the equal start (10.1) and to the averages (10.2)."""

from harness.model.bank import Mistake

SEND = """        for tensor in (*module.parameters(), *module.buffers()):
            _broadcast(tensor.detach(), source=0)
"""
WRITE = """    if data is not tensor:
        tensor.copy_(data)
"""
DIVIDE = "        flat /= dist.get_world_size()  # Before the sum, which float16 might not hold.\n"
SET = "                    parameter.grad = average.view(parameter.shape)\n"
FORWARD = "        return self.module(*args, **kwargs)\n"
MEAN = "    return (losses * (dist.get_world_size() / count.item())).sum()\n"
COUNT = """    count = torch.tensor(losses.numel(), device=losses.device)
    dist.all_reduce(count)
"""
START = "        self._running.append((flat, dist.all_reduce(flat, async_op=True)))\n"

MISTAKES = [
    Mistake("starts_apart", "10.1", "every rank has what rank 0 has", (SEND, ""), only=True),
    Mistake(
        "buffers_stay_apart",
        "10.1",
        "an integer buffer",
        ("(*module.parameters(), *module.buffers())", "module.parameters()"),
        only=True,
    ),
    Mistake(
        "the_state_dict_is_sent",
        "10.1",
        "buffers that are not saved go too",
        ("(*module.parameters(), *module.buffers())", "module.state_dict().values()"),
        only=True,
    ),
    Mistake(
        "frozen_stay_apart",
        "10.1",
        "frozen parameters go too",
        (
            "(*module.parameters(), *module.buffers())",
            "(*(p for p in module.parameters() if p.requires_grad), *module.buffers())",
        ),
        only=True,
    ),
    Mistake(
        "buffers_in_eval_stay_apart",
        "10.1",
        "an integer buffer",
        (
            SEND,
            """        live = [m for m in module.modules() if m.training or list(m.parameters(recurse=False))]
        for tensor in (*module.parameters(), *(b for m in live for b in m.buffers(recurse=False))):
            _broadcast(tensor.detach(), source=0)
""",
        ),
        only=True,
    ),
    Mistake(
        "own_children_only",
        "10.1",
        "an integer buffer",
        (
            "(*module.parameters(), *module.buffers())",
            "(*module.parameters(recurse=False), *module.buffers(recurse=False))",
        ),
    ),
    Mistake("strided_lost", "10.1", "a parameter that is not contiguous", (WRITE, "")),
    Mistake(
        "starts_at_the_average",
        "10.1",
        "on 2 ranks: the bytes of weight on rank 0",
        (
            "            _broadcast(tensor.detach(), source=0)\n",
            """            tensor = tensor.detach()
            both = tensor.double().contiguous()
            dist.all_reduce(both)
            tensor.copy_(both / dist.get_world_size())
""",
        ),
        only=True,
    ),
    Mistake(
        "others_are_added_up_as_zeros",
        "10.1",
        "NaN, infinity and -0.0 go as they are",
        (
            "            _broadcast(tensor.detach(), source=0)\n",
            """            tensor = tensor.detach()
            data = tensor.contiguous() * (dist.get_rank() == 0)
            dist.all_reduce(data)
            tensor.copy_(data)
""",
        ),
        only=True,
    ),
    Mistake(
        "the_last_rank_is_the_root",
        "10.1",
        "rank 0's own stay as they were",
        ("source=0)", "source=dist.get_world_size() - 1)"),
        only=True,
    ),
    Mistake(
        "sent_as_float32",
        "10.1",
        "the bytes of weight",
        (
            "            _broadcast(tensor.detach(), source=0)\n",
            """            data = tensor.detach().float().contiguous()
            dist.broadcast(data, 0)
            tensor.detach().copy_(data)
""",
        ),
    ),
    Mistake(
        "sent_as_float64",
        "10.1",
        "an integer buffer",
        (
            "            _broadcast(tensor.detach(), source=0)\n",
            """            data = tensor.detach().double().contiguous()
            dist.broadcast(data, 0)
            tensor.detach().copy_(data)
""",
        ),
        only=True,
    ),
    Mistake(
        "new_parameters",
        "10.1",
        "no longer tied",
        (
            SEND,
            SEND
            + """        for child in module.modules():
            for name, parameter in list(child.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(child, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
""",
        ),
    ),
    Mistake(
        "frozen_wake_up",
        "10.1",
        "frozen on rank 0: requires_grad is True",
        (
            SEND,
            SEND
            + """        for parameter in module.parameters():
            parameter.requires_grad_(True)
""",
        ),
    ),
    Mistake(
        "all_zeros",
        "10.1",
        "rank 0's own stay as they were",
        ("            _broadcast(tensor.detach(), source=0)\n", "            tensor.detach().zero_()\n"),
    ),
    # 10.2
    Mistake("sums", "10.2", "not a sum", (DIVIDE, ""), only=True),
    Mistake(
        "divided_twice",
        "10.2",
        "divided once",
        (
            "parameter.grad = average.view(parameter.shape)",
            "parameter.grad = average.view(parameter.shape) / dist.get_world_size()",
        ),
        only=True,
    ),
    Mistake(
        "divided_after_the_sum",
        "10.2",
        "divide by the number of ranks before the sum",
        (DIVIDE, ""),
        (
            "parameter.grad = average.view(parameter.shape)",
            "parameter.grad = average.view(parameter.shape) / dist.get_world_size()",
        ),
        only=True,
    ),
    Mistake(
        "averaged_by_the_group",
        "10.2",
        "divide by the number of ranks before the sum",
        (DIVIDE, ""),
        ("dist.all_reduce(flat, async_op=True)", "dist.all_reduce(flat, dist.ReduceOp.AVG, async_op=True)"),
        only=True,
    ),
    Mistake(
        "only_float16_divided_before_the_sum",
        "10.2",
        "divide by the number of ranks before the sum",
        (DIVIDE, "        flat /= dist.get_world_size() if flat.dtype == torch.float16 else 1\n"),
        (
            "parameter.grad = average.view(parameter.shape)",
            (
                "parameter.grad = average.view(parameter.shape) / (1 if average.dtype == torch.float16 else "
                "dist.get_world_size())"
            ),
        ),
        only=True,
    ),
    Mistake(
        "divided_by_two",
        "10.2",
        "rows (5,) on the ranks",
        (DIVIDE, "        flat /= 2\n"),
    ),
    Mistake(
        "the_maximum",
        "10.2",
        "after finish on rank",
        (DIVIDE, ""),
        ("dist.all_reduce(flat, async_op=True)", "dist.all_reduce(flat, dist.ReduceOp.MAX, async_op=True)"),
    ),
    Mistake(
        "rank_0_wins",
        "10.2",
        "after finish on rank",
        (START, "        flat = flat * dist.get_world_size() * (dist.get_rank() == 0)\n" + START),
    ),
    Mistake(
        "gradients_of_zeros",
        "10.2",
        "after finish on rank",
        (SET, "                    parameter.grad = torch.zeros_like(parameter)\n"),
    ),
    Mistake("gradients_left_alone", "10.2", "after finish on rank", (SET, "                    pass\n")),
    Mistake(
        "sent_in_float32",
        "10.2",
        "gradient of",
        (
            "        flat = torch.cat([*(gradient.flatten() for gradient in gradients), present])\n",
            (
                "        flat = torch.cat([*(gradient.flatten() for gradient in gradients), "
                "present]).float().to(present.dtype)\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "mean_of_means",
        "10.2",
        "this rank's sum",
        (COUNT + MEAN, "    return losses.sum() / max(losses.numel(), 1)\n"),
        only=True,
    ),
    Mistake(
        "means_of_no_rows",
        "10.2",
        "global_mean",
        (MEAN, "    return losses.mean() * (losses.numel() * dist.get_world_size() / count.item())\n"),
        only=True,
    ),
    Mistake(
        "ranks_not_counted",
        "10.2",
        "this rank's sum",
        ("(losses * (dist.get_world_size() / count.item()))", "(losses / count.item())"),
        only=True,
    ),
    Mistake(
        "empty_ranks_not_counted",
        "10.2",
        "this rank's sum",
        (COUNT, COUNT + "    full = torch.tensor(int(losses.numel() > 0))\n    dist.all_reduce(full)\n"),
        ("dist.get_world_size() / count.item()", "full.item() / count.item()"),
        only=True,
    ),
    Mistake(
        "counted_in_the_losses_dtype",
        "10.2",
        "infinite in float16",
        (
            "torch.tensor(losses.numel(), device=losses.device)",
            "torch.tensor(losses.numel(), device=losses.device, dtype=losses.dtype)",
        ),
        only=True,
    ),
    Mistake("a_number_for_a_tensor", "10.2", "a float came", (MEAN, MEAN.replace(".sum()\n", ".sum().item()\n"))),
    Mistake("mean_in_float32", "10.2", "torch.float32 came", (MEAN, MEAN.replace(".sum()\n", ".sum().float()\n"))),
    Mistake(
        "a_mean_without_gradient",
        "10.2",
        "gradient",
        (MEAN, "    return (losses * (dist.get_world_size() / count.item())).sum().detach().requires_grad_()\n"),
        only=True,
    ),
    Mistake(
        "everybody_gets_the_mean",
        "10.2",
        "this rank's sum",
        (
            MEAN,
            (
                "    total = losses.detach().sum()\n"
                "    dist.all_reduce(total)\n"
                "    return total / count.item() + 0 * losses.sum()\n"
            ),
        ),
        only=True,
    ),
    Mistake("keywords_dropped", "10.2", "TypeError", (FORWARD, "        return self.module(*args)\n")),
    Mistake(
        "only_the_first_output",
        "10.2",
        "not what the module returned",
        (
            FORWARD,
            (
                "        output = self.module(*args, **kwargs)\n"
                "        return output if isinstance(output, Tensor) else next(iter(output.values()))\n"
            ),
        ),
        only=True,
    ),
    Mistake(
        "inputs_are_copied",
        "10.2",
        "the module got",
        (FORWARD, "        return self.module(*copy.deepcopy(args), **kwargs)\n"),
        only=True,
    ),
    Mistake(
        "a_copy_of_the_module",
        "10.2",
        "is not the module that was given",
        ("        self.module = module\n", "        self.module = copy.copy(module)\n"),
        only=True,
    ),
    Mistake(
        "by_the_wrapper",
        "10.2",
        "reached",
        (
            "        self.module = module\n",
            (
                "        self.module = module\n"
                "        with contextlib.suppress(Exception):\n"
                "            nn.parallel.DistributedDataParallel(module)\n"
            ),
        ),
        ("import copy\n", "import contextlib\nimport copy\n"),
    ),
    Mistake(
        "by_fully_shard",
        "10.2",
        "reached",
        (
            "        self.module = module\n",
            (
                "        self.module = module\n"
                "        with contextlib.suppress(Exception):\n"
                "            fully_shard(nn.Linear(2, 2))\n"
            ),
        ),
        ("import copy\n", "import contextlib\nimport copy\n"),
        (
            "from torch.distributed import Work\n",
            "from torch.distributed import Work\nfrom torch.distributed.fsdp import fully_shard\n",
        ),
    ),
    Mistake(
        "state_in_the_class",
        "10.2",
        "rank",
        ("        self._running: list[tuple[Tensor, Work]] = []\n", "        type(self)._running = []\n"),
    ),
]

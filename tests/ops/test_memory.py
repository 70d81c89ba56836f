"""What is left of a machine's memory, and of a container's."""

import torch

from blemish.ops.memory import available_memory, cgroup_memory


def test_memory_is_what_the_tightest_control_group_leaves(tmp_path):
    groups, outer = tmp_path / "cgroup", tmp_path / "fs" / "user"
    groups.write_text("0::/user/job\n")
    (outer / "job").mkdir(parents=True)
    assert cgroup_memory(groups, tmp_path / "fs") == float("inf")
    for folder, limit, used in ((outer, "1000", 700), (outer / "job", "max", 100)):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    assert cgroup_memory(groups, tmp_path / "fs") == 350
    groups.write_text("3:cpu,memory:/job\n1:cpu:/\n")
    old = tmp_path / "fs" / "memory" / "job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("90\n")
    (old / "memory.usage_in_bytes").write_text("20\n")
    (old / "memory.stat").write_text("total_inactive_file 5\n")
    assert cgroup_memory(groups, tmp_path / "fs") == 75
    assert cgroup_memory(tmp_path / "absent", tmp_path / "fs") == float("inf")
    assert available_memory(torch.device("cpu")) > 2**24

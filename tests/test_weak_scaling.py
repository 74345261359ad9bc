"""More devices with as many queries each: losses and parameters are those of one device with all queries."""

from pathlib import Path

from helpers import run_on_8_devices


def test_as_many_queries_a_device_on_2_4_8_devices(tmp_path):
    """Two steps of SFT, on meshes that grow along fsdp and data by turns, two queries a device.

    Of sampled rollouts: tests/test_variants.py, on eight devices.
    """
    out = run_on_8_devices(f"""
        import sys
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import jax, numpy as np
        from one_step import build, numbers, two_steps
        from fgrpo_jax.run.sharding import make_mesh
        jax.config.update("jax_disable_most_optimizations", True)

        def steps(queries, *sizes):
            experiment = build({str(tmp_path)!r}, sft__batch_queries=queries)
            mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
            return two_steps(experiment._replace(mesh=mesh), "sft")

        seen = set()
        for devices, sizes in ((2, (1, 2, 1)), (4, (2, 2, 1)), (8, (2, 4, 1))):
            alone = steps(2 * devices, 1, 1, 1)
            seen |= {{row["loss"] for row in alone[2]}}
            found, expected = numbers(steps(2 * devices, *sizes)), numbers(alone)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=f"{{sizes}} {{name}}")
            print(devices)
        assert len(seen) == 6 and all(np.isfinite(list(seen))), seen
    """)
    assert out == ["2", "4", "8"]

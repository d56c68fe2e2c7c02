import os
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FLOORS = ("transport", "dht", "learning", "node", "sim")
found = find_packages(include=[g for f in FLOORS for g in (f, f + ".*")], exclude=["node.api*"])

# One binary for Python 3.11 and newer; interpreters without a GIL have no stable interface.
stable = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")


class Build(build_ext):
    """Flags of the compiler at hand: no fused multiply-add, nothing reordered, or bits would differ among machines."""

    def build_extension(self, extension: Extension) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        extension.extra_compile_args = (
            ["/O2", "/fp:precise"] if msvc else ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0"]
        )
        super().build_extension(extension)


kernels = Extension(
    "shoal.learning.reduce._kernels",
    sources=[os.path.join("learning", "reduce", "kernels.c")],
    define_macros=[("Py_LIMITED_API", "0x030b0000")] if stable else [],
    py_limited_api=stable,
    optional=True,  # without a compiler shoal.learning.reduce.kernels takes numpy
)
pump = Extension(
    "shoal.transport._pump",
    sources=[os.path.join("transport", "pump.c")],
    define_macros=[("Py_LIMITED_API", "0x030b0000")] if stable else [],
    py_limited_api=stable,
    optional=True,  # without a compiler, or on Windows, shoal.transport.pump takes Python's own loops
)
setup(
    packages=["shoal", *("shoal." + p for p in found)],
    package_dir={"shoal": "node/api", **{"shoal." + f: f for f in FLOORS}},
    ext_modules=[kernels] if os.name == "nt" else [kernels, pump],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
)

"""The compiled part; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "stormjib_rows",
            ["data_service/native/rows.c"],
            py_limited_api=True,
            extra_compile_args=["-O3", "-std=c11", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

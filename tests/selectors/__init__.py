# ruff: noqa: A005 - named like the package it tests

"""Integrations with other frameworks, one file each, imported only on use."""

from tikhon.integrations.readings import readings

__all__ = ["readings"]

"""Layouts, plans, schedules, limits and budgets: pure data about ranks."""

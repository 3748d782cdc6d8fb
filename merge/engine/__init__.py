"""Run a plan: workers take chunks, measure what must be measured, compute, write."""

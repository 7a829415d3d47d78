"""gunicorn app:app, which reads this file; workers are recycled after 1,000 requests."""

from ebbtide.integrations.gunicorn import post_fork, worker_exit

__all__ = ["post_fork", "worker_exit"]

workers = 2
preload_app = True  # imports are shared; app.py makes its pipeline after the fork
max_requests = 1000

"""For servers of ASGI: uvicorn asgi:application."""

import os

from django.core.asgi import get_asgi_application

from ebbtide.integrations.django import lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project")
application = lifespan(get_asgi_application())

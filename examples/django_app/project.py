"""Settings and addresses: pip install 'ebbtide[frameworks]', then python manage.py runserver."""

import os

import views
from django.urls import path

SECRET_KEY = os.environ.get("SECRET_KEY", "of this example only")
DEBUG = True
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "project"
USE_TZ = True
LOGGING = {  # tells what came back when a process ends
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}

EBBTIDE = {"budget": 0.4, "keep_alive": "30m"}

urlpatterns = [path("embed", views.embed), path("similarity", views.similarity)]

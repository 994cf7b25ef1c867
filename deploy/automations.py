"""Bring the automations of a Prefect server up to date with automations.yaml; others are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore


def main() -> None:
    """Replace each automation of the file by name: Prefect's own command would make a second one."""
    file = Path(__file__).with_name("automations.yaml")
    wanted = [AutomationCore.model_validate(each) for each in yaml.safe_load(file.read_text())["automations"]]
    with get_client(sync_client=True) as client:
        for automation in wanted:
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)
            sys.stdout.write(f"automation {automation.name}\n")


if __name__ == "__main__":
    main()

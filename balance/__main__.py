"""List the balance methods and their options: python -m balance"""

from balance import METHODS


def main() -> None:
    print("--balance NAME[:OPTION=VALUE...][,NAME...], with --method baseline or remix. Formulas: docs/balance.md")
    for name, method in METHODS.items():
        print(f"\n{name}: {(__import__(method.__module__, fromlist=['x']).__doc__ or '').splitlines()[0]}")
        for option in method.options:
            allowed = f" ({', '.join(option.choices)})" if option.choices else ""
            defaults = [f"default: {option.default}"] if option.default is not None else []
            defaults += [f"{dataset}: {value}" for dataset, value in option.by_dataset.items()]
            default = f" ({'; '.join(defaults)})" if defaults else ""
            print(f"  {option.name:16} {option.help}{allowed}{default}")


if __name__ == "__main__":
    main()

from megatron_post.cli import main

if __name__ == "__main__":
    main()

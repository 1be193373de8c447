/* make_model text|tokens|rounded OUT.ltn [BOS EOS]: a small model for the shell tests; -1: no such token. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/text_model.h"

int main(int argc, char **argv)
{
    int bos = argc > 4 ? atoi(argv[3]) : 1, eos = argc > 4 ? atoi(argv[4]) : 2;

    if (argc < 3) {
        fprintf(stderr, "usage: make_model text|tokens|rounded OUT.ltn [BOS EOS]\n");
        return 2;
    }
    if (strcmp(argv[1], "text") == 0)
        test_write_text_model(argv[2], bos, eos);
    else if (strcmp(argv[1], "rounded") == 0)
        test_write_rounded_model(argv[2], bos, eos);
    else
        test_write_token_model(argv[2], bos, eos);
    return 0;
}

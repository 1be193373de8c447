/* typist SEEN COMMAND...: runs a command on a terminal of its own and types what standard input says, a step
 * a line: type TEXT       waits for the marker "> ", then types the text and Enter more TEXT       the same
 * at the marker "... " see TEXT        waits for text on the terminal, behind what was waited for before keys
 * TEXT       types, at once; \e is Escape, ^X is Ctrl-X interrupt TEXT  types Ctrl-C, again after some
 * seconds, until there is such text on the terminal wait FILE       until it has some bytes All that came to
 * the terminal goes to the file SEEN. Ends with the command's exit status (128 + signal), 98 where a step
 * took more than two minutes, 99 where there is no terminal to be had. */
#include <errno.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE = 120, AGAIN = 3 }; /* seconds */

static char seen[1 << 20]; /* [n_seen] all of it */
static size_t n_seen, searched;
static int terminal;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Takes in what comes within a tenth of a second; false: the command has gone. */
static int look(void)
{
    struct pollfd p = {.fd = terminal, .events = POLLIN};
    if (poll(&p, 1, 100) <= 0)
        return 1;
    if (n_seen == sizeof seen - 1) {
        memmove(seen, seen + sizeof seen / 2, n_seen - sizeof seen / 2);
        n_seen -= sizeof seen / 2;
        searched = searched > sizeof seen / 2 ? searched - sizeof seen / 2 : 0;
    }
    ssize_t n = read(terminal, seen + n_seen, sizeof seen - 1 - n_seen);
    if (n <= 0)
        return n < 0 && errno == EINTR;
    n_seen += (size_t)n;
    return 1;
}

static int see(const char *text, double seconds)
{
    double end = now() + seconds;
    int alive = 1;
    for (;;) {
        char *found = memmem(seen + searched, n_seen - searched, text, strlen(text));
        if (found) {
            searched = (size_t)(found - seen) + strlen(text);
            return 1;
        }
        if (!alive || now() > end)
            return 0;
        alive = look();
    }
}

static int keys(const char *text)
{
    for (; *text; text++) {
        char c = *text;
        if (c == '\\' && text[1] == 'e') {
            c = '\033';
            text++;
        } else if (c == '^' && text[1]) {
            c = *++text & 0x1f;
        }
        if (write(terminal, &c, 1) != 1)
            return 0;
    }
    return 1;
}

static int wait_for(const char *path)
{
    struct stat st;
    for (double end = now() + PATIENCE; now() < end; look())
        if (stat(path, &st) == 0 && st.st_size > 0)
            return 1;
    return 0;
}

static int interrupt(const char *text)
{
    for (double end = now() + PATIENCE; now() < end;)
        if (keys("^C") && see(text, AGAIN))
            return 1;
    return 0;
}

static int step(char *line)
{
    size_t verb = strcspn(line, " ");
    char *text = line + verb + (line[verb] == ' ');

    line[verb] = 0;
    if (strcmp(line, "type") == 0 || strcmp(line, "more") == 0)
        return see(strcmp(line, "type") == 0 ? "> " : "... ", PATIENCE) &&
               write(terminal, text, strlen(text)) == (ssize_t)strlen(text) && write(terminal, "\r", 1) == 1;
    if (strcmp(line, "see") == 0)
        return see(text, PATIENCE);
    if (strcmp(line, "keys") == 0)
        return keys(text);
    if (strcmp(line, "interrupt") == 0)
        return interrupt(text);
    if (strcmp(line, "wait") == 0)
        return wait_for(text);
    fprintf(stderr, "typist: %s: no such step\n", line);
    return 0;
}

static void save(const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(seen, 1, n_seen, f) != n_seen || fclose(f) != 0)
        fprintf(stderr, "typist: %s: %s\n", path, strerror(errno));
}

int main(int argc, char **argv)
{
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    char line[4096];
    int status;

    if (argc < 3) {
        fprintf(stderr, "usage: typist SEEN COMMAND...\n");
        return 2;
    }
    pid_t child = forkpty(&terminal, NULL, NULL, &size);
    if (child < 0)
        return 99;
    if (child == 0) {
        setenv("TERM", "xterm", 1);
        execvp(argv[2], argv + 2);
        _exit(127);
    }
    int failed = 0;
    while (!failed && fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        char *copy = strdup(line);
        failed = !step(line);
        if (failed)
            fprintf(stderr, "typist: in vain: %s\n", copy);
        free(copy);
    }
    double end = now() + PATIENCE;
    while (!failed && look()) /* to the end of all that it says */
        failed = now() > end;
    if (failed)
        kill(child, SIGKILL);
    waitpid(child, &status, 0);
    save(argv[1]);
    return failed ? 98 : WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

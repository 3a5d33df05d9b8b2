/* A plugin from the parent's side: compiling it, starting its worker, asking for something and not waiting forever. */
#include "doors.h"
#include "program.h"

#include "../ref_cpu/check.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <omp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* grade.mk says where the headers are and which compilers built this program. */
#ifndef FMOE_SOURCE
#define FMOE_SOURCE "."
#endif
#ifndef FMOE_CC
#define FMOE_CC "cc"
#endif
#ifndef FMOE_NVCC
#define FMOE_NVCC "nvcc"
#endif

static const char headers[] = "-I" FMOE_SOURCE "/chapters";
static const char conversions[] = FMOE_SOURCE "/ref_cpu/dtype.c", messages[] = FMOE_SOURCE "/ref_cpu/status.c";

const char *plugin_program = "/proc/self/exe";

/* ---- Compiling --------------------------------------------------------------------------------------------------- */

static bool ends_in(const char *text, const char *end) {
    size_t length = strlen(text), tail = strlen(end);
    return length > tail && strcmp(text + length - tail, end) == 0;
}

static const char *either(const char *variable, const char *otherwise) {
    const char *value = getenv(variable);
    return value && *value ? value : otherwise;
}

/* Runs a command whose output goes to stderr; its status, or -1. */
static int run_command(char *const *argv) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        dup2(STDERR_FILENO, STDOUT_FILENO);
        execvp(argv[0], argv);
        fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
        _exit(127);
    }
    int status = -1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return child > 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* With it: conversions of storage types and fmoe_fail, for a kernel in C to use. */
static int compile_c(const char *source, const char *library) {
    char *const argv[] = {(char *)either("CC", FMOE_CC),
                          "-std=gnu11",
                          "-O3",
                          "-march=native",
                          "-fopenmp",
                          "-Wall",
                          "-shared",
                          "-fPIC",
                          (char *)headers,
                          (char *)source,
                          (char *)conversions,
                          (char *)messages,
                          "-o",
                          (char *)library,
                          "-lm",
                          NULL};
    return run_command(argv);
}

static int compile_cuda(const char *source, const char *library) {
    char *const argv[] = {(char *)either("NVCC", FMOE_NVCC),
                          "-std=c++17",
                          "-O3",
                          "-arch=native",
                          "-shared",
                          "-Xcompiler",
                          "-fPIC",
                          (char *)headers,
                          (char *)source,
                          "-o",
                          (char *)library,
                          NULL};
    return run_command(argv);
}

/* The library's absolute path, so that dlopen does not search for it. */
static bool make_library(plugin *p) {
    bool c = ends_in(p->path, ".c"), cuda = ends_in(p->path, ".cu");
    char found[PATH_MAX];
    if (!c && !cuda) {
        if (!realpath(p->path, found)) {
            snprintf(p->why, sizeof p->why, "%.200s: %s", p->path, strerror(errno));
            return false;
        }
        snprintf(p->library, sizeof p->library, "%.500s", found);
        return true;
    }
    if (access(p->path, R_OK) != 0) {
        snprintf(p->why, sizeof p->why, "%.200s: %s", p->path, strerror(errno));
        return false;
    }
    const char *slash = strrchr(p->path, '/'), *file = slash ? slash + 1 : p->path;
    if (!getcwd(found, sizeof found))
        return false;
    snprintf(p->library, sizeof p->library, "%.300s/build/plugins/%.80s.so", found, file);
    make_folders(p->library);
    unlink(p->library);
    int status = c ? compile_c(p->path, p->library) : compile_cuda(p->path, p->library);
    if (status != 0)
        snprintf(p->why, sizeof p->why, "%.200s does not compile (%s, status %d)", p->path,
                 c ? either("CC", FMOE_CC) : either("NVCC", FMOE_NVCC), status);
    return status == 0;
}

/* ---- The worker -------------------------------------------------------------------------------------------------- */

/* Waits for a second; whether it left. */
static bool leaves_by_itself(pid_t pid, int *status) {
    for (int ms = 0; ms < 1000; ms++) {
        if (waitpid(pid, status, WNOHANG) == pid)
            return true;
        usleep(1000);
    }
    return false;
}

/* Ends the worker and all that it started. */
static void stop(plugin *p) {
    kill(-p->pid, SIGKILL);
    while (waitpid(p->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    close(p->socket);
    p->pid = 0;
}

/* The same for one that closed its end of the socket: what became of it. */
static void bury(plugin *p, char *how, size_t size) {
    int status = 0;
    bool left = leaves_by_itself(p->pid, &status);
    stop(p);
    if (!left)
        snprintf(how, size, "closed its socket");
    else if (WIFSIGNALED(status))
        snprintf(how, size, "crashed: %s", strsignal(WTERMSIG(status)));
    else
        snprintf(how, size, "left its process with exit(%d) instead of returning", WEXITSTATUS(status));
}

void plugin_close(plugin *p) {
    if (p->pid)
        stop(p);
    if (p->memory > 0)
        close(p->memory);
    p->memory = 0;
}

/* Another program in place of a copy of this one: threads and devices do not survive a fork. */
static void become_worker(const plugin *p, int socket) {
    char socket_text[16], memory_text[16], threads[16];
    snprintf(socket_text, sizeof socket_text, "%d", socket);
    snprintf(memory_text, sizeof memory_text, "%d", p->memory);
    snprintf(threads, sizeof threads, "%d", omp_get_max_threads());
    setenv("OMP_NUM_THREADS", threads, 1);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0);
    fcntl(socket, F_SETFD, 0);
    fcntl(p->memory, F_SETFD, 0);
    dup2(STDERR_FILENO, STDOUT_FILENO); /* what it prints stays out of the table */
    char *const argv[] = {(char *)plugin_program, DOOR_WORKER, (char *)p->library, socket_text, memory_text, NULL};
    execv(plugin_program, argv);
    fprintf(stderr, "%s: %s\n", plugin_program, strerror(errno));
    _exit(127);
}

/* The next message of exactly this size, or why none came; the worker is gone then. */
static fmoe_status hear(plugin *p, void *message, size_t size, double limit_s, const char *doing, char *why) {
    struct pollfd waiting = {.fd = p->socket, .events = POLLIN};
    double end = fmoe_now_ms() + 1e3 * limit_s;
    int ready = 0;
    for (double left = 1e3 * limit_s; ready == 0 && left > 0; left = end - fmoe_now_ms()) {
        ready = poll(&waiting, 1, (int)fmin(left + 1, 1e9));
        if (ready < 0 && errno == EINTR)
            ready = 0;
    }
    if (ready <= 0) {
        stop(p);
        snprintf(why, DOOR_TEXT, "no answer within %g s %s: it hangs, or --time-limit is too short", limit_s, doing);
        return fmoe_fail(FMOE_UNSUPPORTED, "%s", why);
    }
    if (recv(p->socket, message, size, MSG_DONTWAIT) == (ssize_t)size)
        return FMOE_OK;
    char how[DOOR_TEXT / 2];
    bury(p, how, sizeof how);
    snprintf(why, DOOR_TEXT, "%s %s", how, doing);
    return fmoe_fail(FMOE_UNSUPPORTED, "%s", why);
}

static fmoe_status start(plugin *p, char *why) {
    int ends[2];
    if (p->memory <= 0)
        p->memory = memfd_create("plugin", MFD_CLOEXEC);
    if (p->memory < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
        snprintf(why, DOOR_TEXT, "no process for it: %s", strerror(errno));
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s", why);
    }
    fflush(NULL);
    pid_t child = fork();
    if (child == 0)
        become_worker(p, ends[1]);
    close(ends[1]);
    if (child < 0) {
        close(ends[0]);
        snprintf(why, DOOR_TEXT, "no process for it: %s", strerror(errno));
        return fmoe_fail(FMOE_OUT_OF_MEMORY, "%s", why);
    }
    setpgid(child, child);
    p->pid = child;
    p->socket = ends[0];
    double limit_s = fmax(p->limit_s, 20); /* a CUDA library takes its time */
    return hear(p, &p->about, sizeof p->about, limit_s, "while it was loaded", why);
}

fmoe_status plugin_ask(plugin *p, const door_request *request, door_reply *reply, char *why) {
    static const char *const doing[] = {"when asked for its workspace", "in its call", "while it was timed"};
    if (!p->pid)
        TRY(start(p, why));
    /* Where the worker is gone already, hear says how. */
    (void)send(p->socket, request, sizeof *request, MSG_NOSIGNAL);
    return hear(p, reply, sizeof *reply, p->limit_s, doing[request->what], why);
}

/* ---- Loading ----------------------------------------------------------------------------------------------------- */

void plugin_open(plugin *p, const char *path, double limit_s) {
    *p = (plugin){.path = path, .limit_s = limit_s};
    if (!make_library(p))
        return;
    p->ready = start(p, p->why) == FMOE_OK && p->about.loaded;
    if (p->pid && !p->about.loaded)
        memcpy(p->why, p->about.text, sizeof p->why);
}

bool plugin_takes(const plugin *p, fmoe_dtype dtype) {
    return !p->about.dtypes || (p->about.dtypes & FMOE_ONLY(dtype));
}

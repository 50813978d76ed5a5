/* Counts the system calls that concern files below one directory, over all threads, and strikes at the n-th.

   Preloaded (LD_PRELOAD), it stands before the C library's functions and does nothing until `shim_arm`. 64-bit Linux:
   what is let through goes to the kernel directly. Not seen: stdio's own writes, memory maps, raw `syscall`s. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The numbers are those of attacks/shim.py. */
enum { CHANGES = 1, WRITES = 2, READS = 4 };                          /* which calls count */
enum { COUNT = 0, KILL = 1, KILL_HALFWAY = 2, FAIL = 3, SHORTEN = 4 }; /* what happens at the n-th */
enum verdict { PROCEED, HALVE, HALVE_AND_DIE, REFUSE };

#define MAX_CALLS 8192
#define CALL_BYTES 96
#define MAX_PARTS 1024

static char directory[4096];
static atomic_int armed;
static int scope, action, error;
static long first, last;
static unsigned jitter_usecs;
static atomic_long num_calls, num_struck;
static atomic_uint seed;
static char calls[MAX_CALLS][CALL_BYTES]; /* "name path" of each counted call */
static long struck[16];

/* ------------------------------------------------------------------ controls */

void shim_disarm(void) { armed = 0; }

/* Strikes at calls `at` to `at + times - 1`, counted from 1. */
void shim_arm(const char *path, int which, int what, long at, long times, int with_error, unsigned jitter, unsigned from) {
    shim_disarm();
    snprintf(directory, sizeof directory, "%s", path);
    scope = which, action = what, error = with_error, first = at, last = at + times - 1;
    jitter_usecs = jitter, seed = from;
    num_calls = num_struck = 0;
    armed = 1;
}

long shim_calls(void) { return num_calls; }
long shim_struck(void) { return num_struck; }
const char *shim_call(long number) { return number >= 1 && number <= MAX_CALLS ? calls[number - 1] : ""; }
long shim_struck_call(long index) { return index < 16 ? struck[index] : 0; }

/* ------------------------------------------------------------------ which calls, and what happens to them */

static int is_below(const char *path) {
    size_t length = strlen(directory);
    return strncmp(path, directory, length) == 0 && (path[length] == 0 || path[length] == '/');
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

/* The absolute path that a call means. */
static void resolve(int fd, const char *path, char *absolute, size_t size) {
    char start[4096] = "";
    if (path != NULL && path[0] == '/') {
        snprintf(absolute, size, "%s", path);
        return;
    }
    if (fd != AT_FDCWD)
        path_of(fd, start, sizeof start);
    else if (syscall(SYS_getcwd, start, sizeof start) < 0)
        start[0] = 0;
    snprintf(absolute, size, path != NULL && path[0] ? "%s/%s" : "%s", start, path);
}

static unsigned next_random(void) {
    unsigned value = atomic_fetch_add(&seed, 2654435769u);
    value ^= value >> 16, value *= 0x7feb352du, value ^= value >> 15, value *= 0x846ca68bu;
    return value ^ (value >> 16);
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

static enum verdict strike(int kind, const char *name, int fd, const char *path) {
    if (!armed || !(kind & scope)) return PROCEED;
    int before = errno;
    char absolute[8192];
    resolve(fd, path, absolute, sizeof absolute);
    errno = before;
    if (!is_below(absolute)) return PROCEED;
    /* Before the counting, so that threads overtake each other. */
    if (jitter_usecs) usleep(next_random() % jitter_usecs);
    long number = atomic_fetch_add(&num_calls, 1) + 1;
    if (number <= MAX_CALLS)
        snprintf(calls[number - 1], CALL_BYTES, "%s %.70s", name, absolute + strlen(directory));
    errno = before;
    if (number < first || number > last || action == COUNT) return PROCEED;
    long index = atomic_fetch_add(&num_struck, 1);
    if (index < 16) struck[index] = number;
    if (action == KILL) die();
    if (action == FAIL) {
        errno = error;
        return REFUSE;
    }
    return action == KILL_HALFWAY ? HALVE_AND_DIE : HALVE;
}

/* A write of which half goes out. */
#define HALVABLE(type, kind, name, fd, bytes, call)                                     \
    do {                                                                                \
        enum verdict verdict = strike(kind, name, fd, NULL);                            \
        if (verdict == REFUSE) return -1;                                               \
        if ((verdict == HALVE || verdict == HALVE_AND_DIE) && (bytes) > 1) (bytes) /= 2; \
        type result = (call);                                                           \
        if (verdict == HALVE_AND_DIE) die();                                            \
        return result;                                                                  \
    } while (0)

#define REFUSABLE(kind, name, fd, path, call)                        \
    do {                                                             \
        if (strike(kind, name, fd, path) == REFUSE) return -1;       \
        return (call);                                               \
    } while (0)

#define ALIAS(name, other) extern __typeof__(other) name __attribute__((alias(#other)))

/* ------------------------------------------------------------------ open, and what is written */

int openat(int fd, const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    int changes = flags & (O_CREAT | O_TRUNC);
    REFUSABLE(changes ? CHANGES : READS, changes ? "open" : "open for reading", fd, path,
              syscall(SYS_openat, fd, path, flags, mode));
}
ALIAS(openat64, openat);

int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return openat(AT_FDCWD, path, flags, mode);
}
ALIAS(open64, open);

int creat(const char *path, mode_t mode) { return openat(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
ALIAS(creat64, creat);

ssize_t write(int fd, const void *data, size_t size) {
    HALVABLE(ssize_t, CHANGES | WRITES, "write", fd, size, syscall(SYS_write, fd, data, size));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    HALVABLE(ssize_t, CHANGES | WRITES, "pwrite", fd, size, syscall(SYS_pwrite64, fd, data, size, offset));
}
ALIAS(pwrite64, pwrite);

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    HALVABLE(ssize_t, CHANGES | WRITES, "sendfile", out, size, syscall(SYS_sendfile, out, in, offset, size));
}
ALIAS(sendfile64, sendfile);

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    HALVABLE(ssize_t, CHANGES | WRITES, "copy_file_range", out, size,
             syscall(SYS_copy_file_range, in, from, out, to, size, flags));
}

static size_t total_of(const struct iovec *parts, int count) {
    size_t total = 0;
    for (int n = 0; n < count; n++) total += parts[n].iov_len;
    return total;
}

/* The first `bytes` of `parts`, in `some`; how many parts that is. */
static int take(const struct iovec *parts, int count, size_t bytes, struct iovec *some) {
    int taken = 0;
    for (; taken < count && taken < MAX_PARTS && bytes > 0; taken++) {
        some[taken] = parts[taken];
        if (some[taken].iov_len > bytes) some[taken].iov_len = bytes;
        bytes -= some[taken].iov_len;
    }
    return taken;
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    struct iovec some[MAX_PARTS];
    size_t bytes = total_of(parts, count);
    HALVABLE(ssize_t, CHANGES | WRITES, "pwritev", fd, bytes,
             syscall(SYS_pwritev2, fd, some, take(parts, count, bytes, some), offset, 0L, flags));
}
ALIAS(pwritev64v2, pwritev2);

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    return pwritev2(fd, parts, count, offset, 0);
}
ALIAS(pwritev64, pwritev);

ssize_t writev(int fd, const struct iovec *parts, int count) { return pwritev2(fd, parts, count, -1, 0); }

int ftruncate(int fd, off_t size) { REFUSABLE(CHANGES, "ftruncate", fd, NULL, syscall(SYS_ftruncate, fd, size)); }
ALIAS(ftruncate64, ftruncate);

int truncate(const char *path, off_t size) {
    REFUSABLE(CHANGES, "truncate", AT_FDCWD, path, syscall(SYS_truncate, path, size));
}
ALIAS(truncate64, truncate);

int fallocate(int fd, int mode, off_t offset, off_t size) {
    REFUSABLE(CHANGES, "fallocate", fd, NULL, syscall(SYS_fallocate, fd, mode, offset, size));
}
ALIAS(fallocate64, fallocate);

int posix_fallocate(int fd, off_t offset, off_t size) { /* returns its error */
    int before = errno, result = fallocate(fd, 0, offset, size) ? errno : 0;
    errno = before;
    return result;
}
ALIAS(posix_fallocate64, posix_fallocate);

int fsync(int fd) { REFUSABLE(CHANGES, "fsync", fd, NULL, syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { REFUSABLE(CHANGES, "fdatasync", fd, NULL, syscall(SYS_fdatasync, fd)); }

int sync_file_range(int fd, off64_t offset, off64_t size, unsigned flags) {
    REFUSABLE(CHANGES, "sync_file_range", fd, NULL, syscall(SYS_sync_file_range, fd, offset, size, flags));
}

/* ------------------------------------------------------------------ names */

int mkdirat(int fd, const char *path, mode_t mode) {
    REFUSABLE(CHANGES, "mkdir", fd, path, syscall(SYS_mkdirat, fd, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int fd, const char *path, int flags) {
    REFUSABLE(CHANGES, flags & AT_REMOVEDIR ? "rmdir" : "unlink", fd, path, syscall(SYS_unlinkat, fd, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat2(int from, const char *source, int to, const char *destination, unsigned flags) {
    REFUSABLE(CHANGES, flags ? "renameat2" : "rename", from, source,
              syscall(SYS_renameat2, from, source, to, destination, flags));
}
int renameat(int from, const char *source, int to, const char *destination) {
    return renameat2(from, source, to, destination, 0);
}
int rename(const char *source, const char *destination) {
    return renameat2(AT_FDCWD, source, AT_FDCWD, destination, 0);
}

int linkat(int from, const char *source, int to, const char *destination, int flags) {
    REFUSABLE(CHANGES, "link", to, destination, syscall(SYS_linkat, from, source, to, destination, flags));
}
int link(const char *source, const char *destination) { return linkat(AT_FDCWD, source, AT_FDCWD, destination, 0); }

int symlinkat(const char *target, int fd, const char *path) {
    REFUSABLE(CHANGES, "symlink", fd, path, syscall(SYS_symlinkat, target, fd, path));
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int fchmod(int fd, mode_t mode) { REFUSABLE(CHANGES, "chmod", fd, NULL, syscall(SYS_fchmod, fd, mode)); }
int fchmodat(int fd, const char *path, mode_t mode, int flags) {
    (void)flags;
    REFUSABLE(CHANGES, "chmod", fd, path, syscall(SYS_fchmodat, fd, path, mode));
}
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }

/* ------------------------------------------------------------------ reading */

ssize_t read(int fd, void *data, size_t size) {
    HALVABLE(ssize_t, READS, "read", fd, size, syscall(SYS_read, fd, data, size));
}

ssize_t pread(int fd, void *data, size_t size, off_t offset) {
    HALVABLE(ssize_t, READS, "pread", fd, size, syscall(SYS_pread64, fd, data, size, offset));
}
ALIAS(pread64, pread);

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    struct iovec some[MAX_PARTS];
    size_t bytes = total_of(parts, count);
    HALVABLE(ssize_t, READS, "preadv", fd, bytes,
             syscall(SYS_preadv2, fd, some, take(parts, count, bytes, some), offset, 0L, flags));
}
ALIAS(preadv64v2, preadv2);

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
    return preadv2(fd, parts, count, offset, 0);
}
ALIAS(preadv64, preadv);

#define STATS(suffix)                                                                                                \
    int fstatat##suffix(int fd, const char *path, struct stat##suffix *status, int flags) {                          \
        REFUSABLE(READS, "stat", fd, path, syscall(SYS_newfstatat, fd, path, status, flags));                        \
    }                                                                                                                \
    int stat##suffix(const char *path, struct stat##suffix *status) {                                                \
        return fstatat##suffix(AT_FDCWD, path, status, 0);                                                           \
    }                                                                                                                \
    int lstat##suffix(const char *path, struct stat##suffix *status) {                                               \
        return fstatat##suffix(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW);                                         \
    }                                                                                                                \
    int fstat##suffix(int fd, struct stat##suffix *status) {                                                         \
        REFUSABLE(READS, "fstat", fd, NULL, syscall(SYS_fstat, fd, status));                                         \
    }
STATS()
STATS(64)

DIR *opendir(const char *path) {
    static DIR *(*real)(const char *);
    if (real == NULL) real = (DIR * (*)(const char *)) dlsym(RTLD_NEXT, "opendir");
    return strike(READS, "opendir", AT_FDCWD, path) == REFUSE ? NULL : real(path);
}

DIR *fdopendir(int fd) {
    static DIR *(*real)(int);
    if (real == NULL) real = (DIR * (*)(int)) dlsym(RTLD_NEXT, "fdopendir");
    return strike(READS, "opendir", fd, NULL) == REFUSE ? NULL : real(fd);
}

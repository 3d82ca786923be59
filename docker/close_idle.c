/*
 * Loaded into tritonserver (LD_PRELOAD), so that it ends in order while clients hold idle connections.
 *
 * After SIGTERM, Triton waits for every HTTP connection to close before it stops anything else. A client's idle
 * keep-alive connection makes it wait for all of --exit-timeout-secs and then exit with 1. So from SIGTERM on, the
 * reading side of each quiet connection to the HTTP port is shut: an idle one ends at once, and one with a request
 * in flight is read again only after its answer was sent. The embedded server does this from outside
 * (server/supervisor.py), which a container's seccomp profile forbids.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define QUIET_MS 300
#define TICK_US 100000

static int wake[2] = {-1, -1};
static in_port_t http_port;
static sighandler_t chained;

__attribute__((constructor)) static void read_settings(void)
{
    const char *port = getenv("TRITONSMITH_HTTP_PORT");
    http_port = (in_port_t)atoi(port != NULL ? port : "8000");
    unsetenv("LD_PRELOAD"); /* models' own processes do without */
}

static int is_quiet_http_connection(int descriptor)
{
    struct sockaddr_storage address = {0};
    socklen_t size = sizeof address;
    if (getsockname(descriptor, (struct sockaddr *)&address, &size) != 0)
        return 0;
    in_port_t port = 0;
    if (address.ss_family == AF_INET)
        port = ntohs(((struct sockaddr_in *)&address)->sin_port);
    if (address.ss_family == AF_INET6)
        port = ntohs(((struct sockaddr_in6 *)&address)->sin6_port);
    struct tcp_info info = {0};
    size = sizeof info;
    if (port != http_port || getsockopt(descriptor, IPPROTO_TCP, TCP_INFO, &info, &size) != 0)
        return 0;
    return info.tcpi_state == TCP_ESTABLISHED && info.tcpi_last_data_recv > QUIET_MS;
}

static void close_idle_connections(void)
{
    DIR *descriptors = opendir("/proc/self/fd");
    if (descriptors == NULL)
        return;
    for (struct dirent *entry; (entry = readdir(descriptors)) != NULL;) {
        int descriptor = atoi(entry->d_name); /* "." and "..": 0, which is no such socket */
        if (is_quiet_http_connection(descriptor))
            shutdown(descriptor, SHUT_RD);
    }
    closedir(descriptors);
}

static void *wait_for_the_end(void *nothing)
{
    char byte;
    while (read(wake[0], &byte, 1) != 1)
        ;
    for (;;) {
        close_idle_connections();
        usleep(TICK_US);
    }
    return nothing;
}

static void on_terminate(int number)
{
    ssize_t written = write(wake[1], "", 1);
    (void)written;
    chained(number);
}

static int start_waiting(void)
{
    sigset_t all, before;
    pthread_t thread;
    if (pipe2(wake, O_CLOEXEC) != 0)
        return 0;
    sigfillset(&all); /* signals stay with Triton's own threads */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&thread, NULL, wait_for_the_end, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !failed;
}

/* Takes the place of libc's: Triton registers its handler of SIGTERM by this function. */
sighandler_t signal(int number, sighandler_t handler)
{
    sighandler_t (*original)(int, sighandler_t) = (sighandler_t(*)(int, sighandler_t))dlsym(RTLD_NEXT, "signal");
    if (number != SIGTERM || handler == SIG_DFL || handler == SIG_IGN || chained != NULL || !start_waiting())
        return original(number, handler);
    chained = handler;
    return original(number, on_terminate);
}

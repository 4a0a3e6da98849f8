/*
 * A stand-in for pyxis in tests: srun and sbatch take pyxis's options, and a task with an image
 * really runs inside it. An image is a directory; a registry's image NAME is the directory of that
 * name below the plugin's "images" argument, with an underscore for each of "/", ":" and "#".
 * Two files of an image are read here:
 *   .host-paths   paths of the node that the image has too, one a line (saves copying /usr)
 *   .environment  NAME=VALUE lines; they win over the job's environment, except --container-env
 *
 * As in pyxis: all tasks of a step on a node share a container, one that runs under a name is
 * joined and keeps its first mounts, the root file system is read-only unless asked otherwise,
 * /tmp is the container's own, the home is absent unless asked for, and a failed start fails the
 * step. Where the file of the argument "silent_failure" exists, a failed start ends the task with
 * status 0 instead, as pyxis 0.24 did. Each start adds a line to /run/pyxis-standin/log.
 *
 * Not as in pyxis: no user namespace, and no file system that outlives its tasks.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <pwd.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(pyxis, 1)

#define RUN_DIR "/run/pyxis-standin"
#define NEW_ROOT RUN_DIR "/root"

enum { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, ENV, N_VALUES, HOME = N_VALUES, ENTRYPOINT, REMAP, WRITABLE, N_OPTIONS };
static const char *const names[N_OPTIONS] = {"image", "mounts", "workdir", "name", "save", "env", "home", "entrypoint", "remap-root", "writable"};
static char *value[N_VALUES]; /* NULL: not given */
static bool on[N_OPTIONS];
static char reason[PATH_MAX + 256];

static int set_value(int option, const char *text, int remote)
{
	(void)remote;
	if (text == NULL || *text == '\0') {
		slurm_error("pyxis: --container-%s: argument required", names[option]);
		return -1;
	}
	free(value[option]);
	value[option] = strdup(text);
	return 0;
}
static int switch_on(int option, const char *text, int remote)
{
	(void)text;
	(void)remote;
	on[option] = true;
	return 0;
}
static int switch_off(int option, const char *text, int remote)
{
	(void)text;
	(void)remote;
	on[option] = false;
	return 0;
}

static struct spank_option options[] = {
	{"container-image", "IMAGE", "image of the container", 1, IMAGE, set_value},
	{"container-mounts", "SRC:DST[:FLAGS][,...]", "bind mounts", 1, MOUNTS, set_value},
	{"container-workdir", "PATH", "working directory", 1, WORKDIR, set_value},
	{"container-name", "NAME", "name of the container", 1, NAME, set_value},
	{"container-save", "PATH", "recorded, not done", 1, SAVE, set_value},
	{"container-env", "NAME[,NAME...]", "variables that win over the image's", 1, ENV, set_value},
	{"container-mount-home", NULL, "mount the home", 0, HOME, switch_on},
	{"no-container-mount-home", NULL, "do not mount the home", 0, HOME, switch_off},
	{"container-entrypoint", NULL, "recorded, not done", 0, ENTRYPOINT, switch_on},
	{"no-container-entrypoint", NULL, "recorded, not done", 0, ENTRYPOINT, switch_off},
	{"container-remap-root", NULL, "recorded, not done", 0, REMAP, switch_on},
	{"no-container-remap-root", NULL, "recorded, not done", 0, REMAP, switch_off},
	{"container-writable", NULL, "writable root file system", 0, WRITABLE, switch_on},
	{"container-readonly", NULL, "read-only root file system", 0, WRITABLE, switch_off},
};

/* Not the table that Slurm reads by itself: sbatch and salloc ignore that one. */
int slurm_spank_init(spank_t spank, int ac, char **av)
{
	(void)ac;
	(void)av;
	for (size_t i = 0; i < sizeof options / sizeof *options; i++)
		if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS)
			return -1;
	return 0;
}

/* Keeps the first reason why the container cannot start, and returns -1. */
static int fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	if (*reason == '\0')
		vsnprintf(reason, sizeof reason, format, args);
	va_end(args);
	return -1;
}

static const char *argument(int ac, char **av, const char *name)
{
	size_t n = strlen(name);
	for (int i = 0; i < ac; i++)
		if (strncmp(av[i], name, n) == 0 && av[i][n] == '=')
			return av[i] + n + 1;
	return "";
}

static int make_parents(char *path)
{
	for (char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		int rc = mkdir(path, 0755);
		*slash = '/';
		if (rc != 0 && errno != EEXIST)
			return fail("cannot make the parents of %s: %s", path, strerror(errno));
	}
	return 0;
}

/* Makes SRC appear at DST of the new root; a link is made again as the link it is. */
static int place(const char *src, const char *dst, bool read_only, bool follow)
{
	struct stat st;
	char path[PATH_MAX], link[PATH_MAX];
	snprintf(path, sizeof path, NEW_ROOT "/%s", dst);
	if ((follow ? stat(src, &st) : lstat(src, &st)) != 0)
		return fail("%s: %s", src, strerror(errno));
	if (make_parents(path) != 0)
		return -1;
	if (S_ISLNK(st.st_mode)) {
		ssize_t n = readlink(src, link, sizeof link - 1);
		link[n < 0 ? 0 : n] = '\0';
		if (symlink(link, path) != 0 && errno != EEXIST)
			return fail("%s: %s", path, strerror(errno));
		return 0;
	}
	if (S_ISDIR(st.st_mode)) {
		mkdir(path, 0755);
	} else {
		int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
		if (fd >= 0)
			close(fd);
	}
	if (mount(src, path, NULL, MS_BIND | MS_REC, NULL) != 0)
		return fail("cannot mount %s at %s: %s", src, dst, strerror(errno));
	if (read_only && mount(NULL, path, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL) != 0)
		return fail("cannot make %s read-only: %s", dst, strerror(errno));
	return 0;
}

/* Calls use(line) for each line of a file of the image; no such file is no line. */
static int for_lines(const char *image, const char *file, int (*use)(char *, void *), void *data)
{
	char path[PATH_MAX], *line = NULL;
	size_t size = 0;
	int rc = 0;
	snprintf(path, sizeof path, "%s/%s", image, file);
	FILE *f = fopen(path, "re");
	while (f != NULL && rc == 0 && getline(&line, &size, f) > 0) {
		line[strcspn(line, "\n")] = '\0';
		if (*line != '\0')
			rc = use(line, data);
	}
	free(line);
	if (f != NULL)
		fclose(f);
	return rc;
}
static int place_host_path(char *path, void *unused)
{
	(void)unused;
	return place(path, path, false, false);
}
static int set_variable(char *line, void *spank)
{
	char *equals = strchr(line, '=');
	if (equals == NULL)
		return fail("no NAME=VALUE in .environment: %s", line);
	*equals = '\0';
	char *kept = strdup(value[ENV] ? value[ENV] : ""), *rest = NULL;
	bool keep = false;
	for (char *name = strtok_r(kept, ",", &rest); name != NULL; name = strtok_r(NULL, ",", &rest))
		keep = keep || strcmp(name, line) == 0;
	free(kept);
	if (!keep)
		spank_setenv(spank, line, equals + 1, 1);
	return 0;
}

static int place_image(const char *image)
{
	DIR *dir = opendir(image);
	if (dir == NULL)
		return fail("no such image: %s (%s)", image, strerror(errno));
	int rc = 0;
	for (struct dirent *entry; rc == 0 && (entry = readdir(dir)) != NULL;) {
		char src[PATH_MAX];
		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		snprintf(src, sizeof src, "%s/%s", image, entry->d_name);
		rc = place(src, entry->d_name, !on[WRITABLE], false);
	}
	closedir(dir);
	return rc;
}

static int place_mounts(void)
{
	char *list = strdup(value[MOUNTS] ? value[MOUNTS] : ""), *rest = NULL;
	int rc = 0;
	for (char *item = strtok_r(list, ",", &rest); rc == 0 && item != NULL; item = strtok_r(NULL, ",", &rest)) {
		char *src = strsep(&item, ":"), *dst = strsep(&item, ":");
		char flags[256];
		snprintf(flags, sizeof flags, "+%s+", item ? item : "");
		if (dst == NULL)
			dst = src;
		if (*src != '/' || *dst != '/')
			rc = fail("--container-mounts takes absolute paths, not %s:%s", src, dst);
		else
			rc = place(src, dst, strstr(flags, "+ro+") != NULL, true);
	}
	free(list);
	return rc;
}

static int place_own(spank_t spank)
{
	uid_t uid = 0;
	char path[PATH_MAX];
	static const char *const own[] = {"tmp", "run"};
	for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
		snprintf(path, sizeof path, NEW_ROOT "/%s", own[i]);
		mkdir(path, 0755);
		if (mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, i == 0 ? "mode=1777" : "mode=755") != 0)
			return fail("cannot mount %s: %s", own[i], strerror(errno));
	}
	if (place("/proc", "proc", false, true) || place("/sys", "sys", false, true) || place("/dev", "dev", false, true))
		return -1;
	spank_get_item(spank, S_JOB_UID, &uid);
	const struct passwd *user = getpwuid(uid);
	if (on[HOME] && user != NULL && place(user->pw_dir, user->pw_dir, false, true) != 0)
		return -1;
	/* The script of a batch step is on the node, wherever the image comes from. */
	uint32_t step = 0;
	char **argv = NULL;
	int argc = 0;
	spank_get_item(spank, S_JOB_STEPID, &step);
	if (step == SLURM_BATCH_SCRIPT && spank_get_item(spank, S_JOB_ARGV, &argc, &argv) == ESPANK_SUCCESS && argc > 0)
		return place(argv[0], argv[0], true, true);
	return 0;
}

static int create(spank_t spank, const char *image, const char *name)
{
	mkdir(NEW_ROOT, 0755);
	if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
	    mount("tmpfs", NEW_ROOT, "tmpfs", 0, "mode=755") != 0)
		return fail("cannot make a mount namespace: %s", strerror(errno));
	/* A path of the host or a mount may lie below the container's own /tmp. */
	if (place_image(image) || place_own(spank) || for_lines(image, ".host-paths", place_host_path, NULL) || place_mounts())
		return -1;
	FILE *mark = fopen(NEW_ROOT "/.container-name", "we");
	if (mark == NULL || fputs(name, mark) < 0 || fclose(mark) != 0)
		return fail("cannot write the container's name");
	if (!on[WRITABLE] && mount(NULL, NEW_ROOT, NULL, MS_REMOUNT | MS_RDONLY, "mode=755") != 0)
		return fail("cannot make the root read-only: %s", strerror(errno));
	if (chdir(NEW_ROOT) != 0 || syscall(SYS_pivot_root, ".", ".") != 0 || umount2(".", MNT_DETACH) != 0 || chdir("/") != 0)
		return fail("cannot enter the root file system: %s", strerror(errno));
	return 0;
}

/* Whether PID is a task that still runs in the container NAME: ids are used again. */
static bool runs(int pid, const char *name)
{
	char path[64], found[NAME_MAX + 1] = "";
	snprintf(path, sizeof path, "/proc/%d/root/.container-name", pid);
	FILE *f = pid > 0 ? fopen(path, "re") : NULL;
	bool same = f != NULL && fgets(found, sizeof found, f) != NULL && strcmp(found, name) == 0;
	if (f != NULL)
		fclose(f);
	return same;
}

static int join(int pid)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNS) != 0)
		return fail("cannot join process %d: %s", pid, strerror(errno));
	close(fd);
	return 0;
}

static void find_image(char *path, size_t size, int ac, char **av)
{
	const char *image = value[IMAGE];
	if (strncmp(image, "docker://", 9) == 0)
		image += 9;
	if (*image == '/') {
		snprintf(path, size, "%s", image);
		return;
	}
	int start = snprintf(path, size, "%s/", argument(ac, av, "images"));
	snprintf(path + start, size - start, "%s", image);
	for (char *c = path + start; *c != '\0'; c++)
		if (strchr("/:#", *c) != NULL)
			*c = '_';
}

static void append_log(uint32_t job, uint32_t step, const char *action)
{
	FILE *log = fopen(RUN_DIR "/log", "ae");
	if (log == NULL)
		return;
	fprintf(log, "job=%u step=%d action=%s", job, (int)step, action);
	for (int i = 0; i < N_VALUES; i++)
		fprintf(log, " %s=%s", names[i], value[i] ? value[i] : "");
	for (int i = N_VALUES; i < N_OPTIONS; i++)
		fprintf(log, " %s=%d", names[i], on[i]);
	fputc('\n', log);
	fclose(log);
}

/* Creates the container or joins it; the record of each is RUN_DIR/names/NAME: "PID IMAGE". */
static int start(spank_t spank, int ac, char **av)
{
	uint32_t job = 0, step = 0;
	int pid = 0, rc;
	char name[NAME_MAX], record[PATH_MAX], image[PATH_MAX] = "";
	spank_get_item(spank, S_JOB_ID, &job);
	spank_get_item(spank, S_JOB_STEPID, &step);
	snprintf(name, sizeof name, "%s", value[NAME] ? value[NAME] : "");
	name[strcspn(name, ":")] = '\0'; /* NAME[:FLAGS] */
	if (*name == '\0')
		snprintf(name, sizeof name, "%u.%d", job, (int)step);
	mkdir(RUN_DIR, 0755);
	mkdir(RUN_DIR "/names", 0755);
	snprintf(record, sizeof record, RUN_DIR "/names/%s", name);
	int lock = open(record, O_CREAT | O_RDWR | O_CLOEXEC, 0644);
	if (lock < 0 || flock(lock, LOCK_EX) != 0)
		return fail("%s: %s", record, strerror(errno));
	char known[PATH_MAX + 32] = "";
	if (read(lock, known, sizeof known - 1) > 0)
		sscanf(known, "%d %4095[^\n]", &pid, image);
	if (*image == '\0' && value[IMAGE] == NULL)
		return fail("there is no container named %s, and no --container-image to make it from", name);
	if (*image == '\0')
		find_image(image, sizeof image, ac, av);
	bool running = runs(pid, name);
	append_log(job, step, running ? "join" : "create");
	rc = running ? join(pid) : create(spank, image, name);
	if (rc == 0 && !running && (ftruncate(lock, 0) != 0 || lseek(lock, 0, SEEK_SET) != 0 || dprintf(lock, "%d %s\n", getpid(), image) < 0))
		rc = fail("%s: %s", record, strerror(errno));
	close(lock);
	return rc == 0 ? for_lines("/", ".environment", set_variable, spank) : rc;
}

static bool wanted(void)
{
	return value[IMAGE] != NULL || value[NAME] != NULL;
}

/*
 * In the task's process, as root. The container is entered later, when Slurm has changed to the
 * job's directory and to the user; until then the process keeps root's capabilities.
 */
int slurm_spank_task_init_privileged(spank_t spank, int ac, char **av)
{
	(void)spank;
	(void)ac;
	(void)av;
	return wanted() ? prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP) : 0;
}

static int drop_capabilities(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct none[2] = {0};
	if (prctl(PR_SET_SECUREBITS, 0) != 0 || syscall(SYS_capset, &header, none) != 0)
		return fail("cannot drop capabilities: %s", strerror(errno));
	return 0;
}

/* In the task's process, as the user. */
int slurm_spank_task_init(spank_t spank, int ac, char **av)
{
	if (!wanted())
		return 0;
	const char *workdir = value[WORKDIR] ? value[WORKDIR] : "/";
	bool silent = access(argument(ac, av, "silent_failure"), F_OK) == 0;
	mode_t mask = umask(022);
	int rc = start(spank, ac, av);
	umask(mask);
	if (rc == 0 && drop_capabilities() == 0) {
		if (chdir(workdir) == 0)
			return 0;
		fail("couldn't chdir to %s: %s", workdir, strerror(errno));
	}
	slurm_error("pyxis: container start failed: %s", reason);
	if (silent)
		_exit(0);
	return -1;
}
